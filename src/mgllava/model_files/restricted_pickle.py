"""Unpickling without code, for the pickles in files of `torch.save`.

A pickle names classes and functions, and says what to call and whose attributes to set. Here it never gets hold of a
real one: each name leads to a stand-in that is made for this one file and holds no state. Stand-ins for what tensors
are built with make `LazyTensor`s; all others make placeholders that take anything and do nothing with it. So no code
runs, no package is imported, and whatever the pickle does to the objects it names ends with it.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

from mgllava.errors import MGLlavaError

# Python's own unpickler allocates a memo as long as the largest index in the pickle.
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}
# A checkpoint with a thousand tensors needs about ten thousand; scanning more than this takes long.
_MAX_OPERATIONS = 5_000_000
# Numbers from a registry of this process, text ids and out-of-band buffers: nothing that `torch.save` writes.
_UNUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}


class UnusableState:
    """Base of the stand-ins: a pickle can neither set their attributes nor those of their classes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes of what it did not make")


class Function(UnusableState):
    """Stands for a function: calls one of ours."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self._function(*args)


class Dictionary(dict[Any, Any]):
    """Stands for an `OrderedDict`, whose attributes (`_metadata` of a state dict) are not kept."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore the attributes."""


class InertObject:
    """Stands for an object of a class that is not loaded. It takes any state and does nothing with it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "InertObject":
        """Make a placeholder from whatever the original would have been made from."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Ignore an item, as of a pickled list subclass."""

    def extend(self, items: Any) -> None:
        """Ignore items, as of a pickled list subclass."""

    def add(self, item: Any) -> None:
        """Ignore an item, as of a pickled set subclass."""


def _encode(text: Any, encoding: Any) -> bytes:
    # How protocol 2 writes bytes.
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it encodes something that is not bytes")
    return text.encode("latin1")


def _bytearray(*args: Any) -> bytearray:
    if args and not isinstance(args[0], bytes | str):
        raise pickle.UnpicklingError("it asks for memory")
    return bytearray(*args)


def unpickle(
    data: bytes, stand_ins: Mapping[str, Any], load_persistent: Callable[[Any], Any]
) -> tuple[Any, list[str]]:
    """Unpickle with stand-ins for every class and function; also list the names that became placeholders."""
    _check_opcodes(data)
    known = {
        "collections.OrderedDict": type("OrderedDict", (Dictionary,), {"__slots__": ()}),
        "collections.Counter": type("Counter", (Dictionary,), {"__slots__": ()}),
        "_codecs.encode": Function(_encode),
        "builtins.bytearray": Function(_bytearray),
        "builtins.complex": Function(complex),
        # C types, whose attributes a pickle cannot set.
        "builtins.set": set,
        "builtins.frozenset": frozenset,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
        **stand_ins,
    }
    # Names of Python 2, as in files of protocol 2 by default.
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


def _check_opcodes(data: bytes) -> None:
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number > _MAX_OPERATIONS:
            raise pickle.UnpicklingError("its pickle has more operations than any file of weights")
        if opcode.name in _UNUSED_OPCODES:
            raise pickle.UnpicklingError(f"it uses {opcode.name}, which no file of weights does")
        if opcode.name in _MEMO_OPCODES and not 0 <= int(argument or 0) <= len(data):
            raise pickle.UnpicklingError("it numbers more objects than it has")


def read_pickle(file: BinaryIO, limit: int) -> bytes:
    """Read one of several consecutive pickles in a file, of at most `limit` bytes."""
    start = file.tell()
    limited = _Limited(file, limit)
    for number, _ in enumerate(pickletools.genops(limited)):  # type: ignore[arg-type]
        if number > _MAX_OPERATIONS:
            raise pickle.UnpicklingError("its pickle has more operations than any file of weights")
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


class _Limited:
    """A file that refuses to be read beyond a limit."""

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
