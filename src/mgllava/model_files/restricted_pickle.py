"""Unpickle files of `torch.save` without running their code.

A pickle names classes and functions, and tells the unpickler which to call and whose attributes to set. Here every
name resolves to a substitute that is created for this file and holds no state. The substitutes of the functions that
rebuild tensors create `StoredTensor`s; all others create objects that accept anything and ignore it. So no code of the
file runs, no package is imported, and nothing that the pickle changes remains afterwards.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import torch

from mgllava.errors import MGLlavaError

# Python's unpickler allocates a memo as long as the largest index in the pickle.
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}
# A checkpoint with a thousand tensors needs about ten thousand; a limit keeps the scan short.
_MAX_OPERATIONS = 5_000_000
# `torch.save` writes no extension codes, text ids or out-of-band buffers.
_UNUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}


class UnusableState:
    """Base of the substitutes: a pickle can set neither their attributes nor those of their classes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes of an object that it did not create")


class Function(UnusableState):
    """Substitute of a function: calls one of ours."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self._function(*args)


class Dictionary(dict[Any, Any]):
    """Substitute of an `OrderedDict`, without its attributes (`_metadata` of a state dict)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class InertObject:
    """Substitute of an object of any other class; it ignores its arguments, state and items."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "InertObject":
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def _ignore(self, value: Any) -> None:
        pass

    __setstate__ = append = extend = add = _ignore


def _encode(text: Any, encoding: Any) -> bytes:
    # Protocol 2 stores bytes as a call of `_codecs.encode`.
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something that is not bytes")
    return text.encode("latin1")


def _bytearray(*args: Any) -> bytearray:
    if args and not isinstance(args[0], bytes | str):
        raise pickle.UnpicklingError("it asks for memory")
    return bytearray(*args)


def unpickle(
    data: bytes, substitutes: Mapping[str, Any], load_persistent: Callable[[Any], Any]
) -> tuple[Any, list[str]]:
    """Unpickle with substitutes for all classes and functions; also list the names that became inert objects."""
    for opcode, argument in _operations(data):
        if opcode in _UNUSED_OPCODES:
            raise pickle.UnpicklingError(f"it uses {opcode}, which no file of weights does")
        if opcode in _MEMO_OPCODES and not 0 <= int(argument or 0) <= len(data):
            raise pickle.UnpicklingError("it numbers more objects than it has")
    known = {
        "collections.OrderedDict": type("OrderedDict", (Dictionary,), {"__slots__": ()}),
        "collections.Counter": type("Counter", (Dictionary,), {"__slots__": ()}),
        "_codecs.encode": Function(_encode),
        "builtins.bytearray": Function(_bytearray),
        "builtins.complex": Function(complex),
        # A pickle cannot set attributes of C types.
        "builtins.set": set,
        "builtins.frozenset": frozenset,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
        **substitutes,
    }
    # Protocol 2 writes the names of Python 2.
    known |= {name.replace("builtins.", "__builtin__."): value for name, value in known.items()}
    foreign: dict[str, Any] = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full_name = f"{module}.{name}"
            if full_name in known:
                return known[full_name]
            if full_name not in foreign:
                foreign[full_name] = type(name.rpartition(".")[2], (InertObject,), {})
            return foreign[full_name]

        def persistent_load(self, pid: Any) -> Any:
            return load_persistent(pid)

    try:
        return Unpickler(io.BytesIO(data)).load(), sorted(foreign)
    except Exception as error:
        if foreign:
            raise ForeignNamesError(sorted(foreign)) from error
        raise


class ForeignNamesError(MGLlavaError, pickle.UnpicklingError):
    """The pickle names classes or functions that weights do not need, and cannot be read even with placeholders."""

    def __init__(self, names: list[str]):
        super().__init__(f"it names {', '.join(names)}")
        self.names = names


def _operations(pickled: Any) -> Iterator[tuple[str, Any]]:
    """Yield the operations of a pickle with their arguments, up to a limit."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if number > _MAX_OPERATIONS:
            raise pickle.UnpicklingError("its pickle has more operations than any file of weights")
        yield opcode.name, argument


def read_pickle(file: BinaryIO, limit: int) -> bytes:
    """Read one of several consecutive pickles in a file, of at most `limit` bytes."""
    start = file.tell()
    for _ in _operations(_Limited(file, limit)):
        pass
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


class _Limited:
    """A file that raises when it is read beyond a limit."""

    def __init__(self, file: BinaryIO, limit: int):
        self._file = file
        self._end = file.tell() + limit

    def read(self, count: int) -> bytes:
        self._check(count)
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(self._end - self._file.tell())
        self._check(0)
        return line

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, count: int) -> None:
        if self._file.tell() + count >= self._end:
            raise pickle.UnpicklingError("its pickle is too large")


__all__ = ["Dictionary", "ForeignNamesError", "Function", "InertObject", "UnusableState", "read_pickle", "unpickle"]
