"""Read files of `torch.save` without running their code; tensors stay on disk and are verified when they are read.

`torch.load` is not made for files from strangers: with `mmap=True` it returns garbage for compressed entries, it never
verifies checksums, and with pickled objects in a file it either reads nothing or runs their code. So the container is
read here: a zip file with a pickle and one entry for each storage or, before torch 1.6, a sequence of pickles followed
by storages.
"""

import math
import mmap
import os
import struct
import sys
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from .errors import ConversionError, one_line
from .lazy_tensor import LazyTensor
from .restricted_pickle import ForeignNamesError, Function, InertObject, UnusableState, read_pickle, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# Far more than the pickles of real checkpoints have, and small enough to read.
_MAX_PICKLE = 1 << 30
_MAX_DIMENSIONS = 64
_MAX_COUNT = 1 << 48
_BLOCK = 1 << 24
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class _Entry:
    """Bytes of a torch file, by their offset or as a compressed entry, with their checksum, if any."""

    name: str
    offset: int
    size: int
    checksum: int | None = None
    compressed: zipfile.ZipInfo | None = None


def _damaged(path: Path, name: str) -> ConversionError:
    return ConversionError(
        f"{path} is damaged: its entry {name} does not have the checksum (CRC-32) that the file gives for it. Fetch "
        "the file again."
    )


class _Archive:
    """A torch file that is mapped into memory; each entry is verified once."""

    def __init__(self, path: Path, entries: Mapping[str, _Entry], swap_bytes: bool):
        self.path = path
        self.entries = entries
        self.swap_bytes = swap_bytes
        self.verified: set[str] = set()
        self._mapped: Any = None

    def storage(self, name: str, dtype: torch.dtype, verify: bool = True) -> torch.UntypedStorage:
        """Return the bytes of an entry in this machine's byte order, aligned to items of a dtype."""
        entry = self.entries[name]
        if entry.compressed is not None:
            storage = self._decompressed(entry)
        else:
            storage = self._map()[entry.offset : entry.offset + entry.size]
            if verify and name not in self.verified:
                RangeCheck(self, [entry]).update(_view(storage), entry.offset)
            if entry.offset % dtype.itemsize:
                storage = storage.clone()
        if self.swap_bytes and dtype.itemsize > 1:
            storage = storage.clone()
            storage.byteswap(dtype)
        return storage

    def checks(self) -> "RangeCheck":
        """Start to verify the checksums of all entries that are not compressed."""
        entries = [entry for entry in self.entries.values() if entry.compressed is None]
        return RangeCheck(self, sorted(entries, key=lambda entry: entry.offset))

    def verify(self) -> None:
        """Verify the checksums of all entries that are not compressed, except for those that were verified before."""
        for name in self.entries.keys() - self.verified:
            if self.entries[name].compressed is None:
                self.storage(name, torch.uint8)

    def _map(self) -> Any:
        if self._mapped is None:
            # By Python, because torch opens only files with UTF-8 names. A private mapping, so the file cannot change.
            with self.path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._mapped = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
        return self._mapped

    def _decompressed(self, entry: _Entry) -> torch.UntypedStorage:
        assert entry.compressed is not None
        storage = torch.UntypedStorage(entry.size)
        target, position = _view(storage), 0
        try:
            # Verifies the checksum, and returns at most the size that the zip directory says.
            with zipfile.ZipFile(self.path) as archive, archive.open(entry.compressed) as file:
                while block := file.read(_BLOCK):
                    target[position : position + len(block)] = block
                    position += len(block)
        except Exception as error:  # damage is reported with many types
            raise ConversionError(
                f"{self.path} is damaged: its entry {entry.name} cannot be decompressed ({error}). Fetch the file "
                "again."
            ) from error
        if position != entry.size:
            raise _damaged(self.path, entry.name)
        return storage


def _view(storage: torch.UntypedStorage) -> Any:
    """Return the bytes of a storage, without a copy."""
    if not storage.nbytes():
        return memoryview(b"")
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data


class RangeCheck:
    """Verifies the checksums of entries, sorted by offset, while the file is read from start to end."""

    def __init__(self, archive: _Archive, entries: Sequence[_Entry]):
        self._archive = archive
        self._entries = entries
        self._current = 0
        self._checksum = 0

    def update(self, block: Any, position: int) -> None:
        """Process the next bytes of the file, which start at `position`."""
        view = memoryview(block)
        while self._current < len(self._entries):
            entry = self._entries[self._current]
            start, stop = (
                min(max(edge - position, 0), len(view)) for edge in (entry.offset, entry.offset + entry.size)
            )
            for first in range(start, stop, _BLOCK):
                self._checksum = zlib.crc32(view[first : min(first + _BLOCK, stop)], self._checksum)
            if entry.offset + entry.size > position + len(view):
                return
            if entry.checksum is not None and self._checksum != entry.checksum:
                raise _damaged(self._archive.path, entry.name)
            self._archive.verified.add(entry.name)
            self._current += 1
            self._checksum = 0

    def finish(self) -> None:
        """Raise if the file ended before its last entry."""
        if self._current < len(self._entries):
            raise _damaged(self._archive.path, self._entries[self._current].name)


# Archives whose tensors are in use. Their checksums are verified while the digest of the file is computed, so that no
# byte is read twice.
_OPEN: "weakref.WeakValueDictionary[tuple[Any, ...], _Archive]" = weakref.WeakValueDictionary()


def _identity(path: Path) -> tuple[Any, ...]:
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def range_check(path: Path) -> RangeCheck | None:
    """Start to verify a file that is about to be read from start to end, if it is a torch file in use."""
    archive = _OPEN.get(_identity(path))
    return None if archive is None else archive.checks()


class _StorageType(UnusableState):
    """Substitute of a class of storages."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


class _TensorType(UnusableState):
    """Substitute of `torch.Tensor` or `torch.nn.Parameter`, which pickles pass as an argument."""

    __slots__ = ()


class _Storage(UnusableState):
    """Substitute of a storage: an entry of the archive, and the dtype of its items."""

    __slots__ = ("archive", "dtype", "name")

    def __init__(self, archive: _Archive, name: str, dtype: torch.dtype):
        self.archive = archive
        self.name = name
        self.dtype = dtype


class StoredTensor(UnusableState):
    """Substitute of a tensor: items of a storage, still in the file."""

    __slots__ = ("archive", "dtype", "name", "offset", "shape", "strides")

    def __init__(self, storage: _Storage, dtype: torch.dtype, offset: Any, shape: Any, strides: Any):
        if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
            raise UnpicklingError("a tensor has impossible sizes")
        numbers = (offset, *shape, *strides)
        if len(shape) > _MAX_DIMENSIONS or not all(type(one) is int and 0 <= one < _MAX_COUNT for one in numbers):
            raise UnpicklingError("a tensor has impossible sizes")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        available = storage.archive.entries[storage.name].size // dtype.itemsize
        if 0 not in shape and last >= available:
            raise UnpicklingError(f"a tensor reaches to item {last} of the {available} in {storage.name}")
        self.archive = storage.archive
        self.name = storage.name
        self.dtype = dtype
        self.offset = offset
        self.shape = tuple(shape)
        self.strides = tuple(strides)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self, verify: bool = True) -> torch.Tensor:
        """Read the values; they are mapped from the file if possible."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        storage = self.archive.storage(self.name, self.dtype, verify)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)

    def lazy(self, origin: str) -> LazyTensor:
        """Wrap it as a [`LazyTensor`]."""
        return LazyTensor(self.shape, self.dtype, origin, self.load)


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: torch.dtype | None = None,
) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise UnpicklingError("a tensor is built from something that is not a storage")
    if metadata:
        # The bits "negated" and "conjugated" change the values.
        raise UnpicklingError(f"a tensor is stored as a lazy view ({metadata}); save it with `.resolve_neg()`")
    return StoredTensor(storage, dtype or storage.dtype, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> StoredTensor:
    if not isinstance(dtype, torch.dtype):
        raise UnpicklingError("a tensor has an unknown dtype")
    return _rebuild_tensor(storage, offset, shape, strides, metadata=metadata, dtype=dtype)


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    if not isinstance(function, Function) or not isinstance(kind, _TensorType) or not isinstance(arguments, tuple):
        raise UnpicklingError("a tensor has a class of its own")
    return function(*arguments)


def _substitutes() -> dict[str, Any]:
    functions: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
        "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
        "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    }
    types = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.Parameter", "torch.nn.parameter.Parameter")
    storages = {
        f"{module}.{name}": _StorageType(dtype)
        for name, dtype in _STORAGE_DTYPES.items()
        for module in ("torch", "torch.storage", "torch.cuda")
    }
    return {
        **{name: Function(function) for name, function in functions.items()},
        **{name: _TensorType() for name in types},
        **storages,
    }


def open_torch_file(path: Path, trust_pickle: bool = False, inert_modules: tuple[str, ...] = ()) -> Any:
    """Open a file of `torch.save`, with a [`StoredTensor`] for each tensor; classes in `inert_modules` are skipped."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
            file.seek(0)
            if not start:
                raise UnpicklingError("it is empty")
            if start.startswith(b"version https://git-lfs"):
                raise UnpicklingError("it is a pointer of Git LFS, not the file itself: run `git lfs pull`")
            content, foreign = _read_zip(path, file) if start.startswith(b"PK") else _read_legacy(path, file)
    except ConversionError:
        raise
    except ForeignNamesError as error:
        raise ConversionError(_refusal(path, error.names)) from error
    except Exception as error:  # damaged files cause errors of many types
        raise ConversionError(
            f"{path} cannot be read as a torch file ({one_line(error)}). Is it truncated? Fetch it again."
        ) from error
    refused = [name for name in foreign if not trust_pickle and name.split(".")[0] not in inert_modules]
    if refused:
        raise ConversionError(_refusal(path, refused))
    return content


def _refusal(path: Path, names: list[str]) -> str:
    rebuilt = [name for name in names if name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))]
    if rebuilt:
        return (
            f"{path} holds tensors that are not plain arrays (sparse, quantized or of another device: it names "
            f"{', '.join(rebuilt)}). Load the file with torch and save dense tensors on the CPU."
        )
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return (
        f"{path} holds pickled objects and not only weights: it names {shown}. "
        "Reading such objects the usual way runs code that comes with the file, so it is refused. "
        "If you trust where the file comes from, pass `trust_pickle=True`: "
        "tensors are then read and every other object is skipped."
    )


def _read_zip(path: Path, file: BinaryIO) -> tuple[Any, list[str]]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.name: entry for entry in _zip_entries(path, file, archive.infolist())}
        if not entries:
            raise UnpicklingError("it is an empty archive")
        # All entries are in one folder, which has the original name of the file.
        folder = next(iter(entries)).partition("/")[0] + "/"
        if folder + "constants.pkl" in entries:
            raise UnpicklingError("it is a TorchScript program, not a file of weights")
        if folder + "data.pkl" not in entries:
            raise UnpicklingError("it has no data.pkl")
        order = b"little"
        if folder + "byteorder" in entries:
            order = _read_small(path, file, archive, entries[folder + "byteorder"])
        if order not in (b"little", b"big"):
            raise UnpicklingError("its byte order is unknown")
        opened = _Archive(path, entries, order.decode() != sys.byteorder)
        data = _read_small(path, file, archive, entries[folder + "data.pkl"])
    opened = _OPEN.setdefault(_identity(path), opened)
    return unpickle(data, _substitutes(), partial(_zip_storage, opened, f"{folder}data/"))


def _zip_entries(path: Path, file: BinaryIO, infos: Sequence[zipfile.ZipInfo]) -> Iterator[_Entry]:
    """Yield the entries with the offsets of their bytes, from the directory at the end of the file."""
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        raise UnpicklingError("it has two entries with the same name")
    # `torch.serialization.set_crc32_options(False)` writes zeros.
    has_checksums = any(info.CRC for info in infos if info.file_size)
    size = path.stat().st_size
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.flag_bits & 0x61 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnpicklingError(f"its entry {info.filename} is encrypted, or packed in a way that is not supported")
        file.seek(info.header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\3\4" or info.header_offset < end:
            raise UnpicklingError(f"its entry {info.filename} is not where the directory says")
        end = offset + info.compress_size
        if end > size:
            raise UnpicklingError(f"its entry {info.filename} is cut off")
        is_plain = info.compress_type == zipfile.ZIP_STORED
        if is_plain and info.compress_size != info.file_size:
            raise UnpicklingError(f"its entry {info.filename} has two sizes")
        checksum = info.CRC if has_checksums else None
        yield _Entry(info.filename, offset, info.file_size, checksum, None if is_plain else info)


def _read_small(path: Path, file: BinaryIO, archive: zipfile.ZipFile, entry: _Entry) -> bytes:
    """Read an entry that is not a storage."""
    if entry.size > _MAX_PICKLE:
        raise UnpicklingError(f"its entry {entry.name} is too large")
    if entry.compressed is not None:
        return archive.read(entry.compressed)  # verifies the checksum
    file.seek(entry.offset)
    data = file.read(entry.size)
    if entry.checksum is not None and zlib.crc32(data) != entry.checksum:
        raise _damaged(path, entry.name)
    return data


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """Read dtype, key and number of items from a pickle's reference to a storage."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
        raise UnpicklingError("it refers to something that is not a storage")
    key, count = pid[2], pid[4]
    if not isinstance(key, str) or type(count) is not int or not 0 <= count < _MAX_COUNT:
        raise UnpicklingError("it refers to an impossible storage")
    return pid[1].dtype, key, count


def _zip_storage(archive: _Archive, folder: str, pid: Any) -> _Storage:
    dtype, key, count = _storage_id(pid)
    entry = archive.entries.get(folder + key)
    if entry is None:
        raise UnpicklingError(f"its storage {key[:40]} is missing")
    if entry.size != count * dtype.itemsize:
        raise UnpicklingError(f"its storage {key} has {entry.size} bytes, expected {count * dtype.itemsize}")
    return _Storage(archive, entry.name, dtype)


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, list[str]]:
    def next_object(load: Callable[[Any], Any]) -> tuple[Any, list[str]]:
        return unpickle(read_pickle(file, _MAX_PICKLE), _substitutes(), load)

    def nothing(pid: Any) -> Any:
        raise UnpicklingError("it refers to a storage outside the state dict")

    if next_object(nothing)[0] != _LEGACY_MAGIC or next_object(nothing)[0] != _LEGACY_PROTOCOL:
        raise UnpicklingError("it does not start like a torch file")
    # The byte order of the machine that wrote the file, and the like. Storages are little-endian on every machine.
    next_object(nothing)

    entries: dict[str, _Entry] = {}
    archive = _Archive(path, entries, sys.byteorder == "big")
    found: dict[str, tuple[torch.dtype, int]] = {}

    def load(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            # A class with its source code, which torch compares; here the code is ignored.
            return pid[1] if isinstance(pid[1], type) and issubclass(pid[1], InertObject) else None
        dtype, key, count = _storage_id(pid)
        if len(pid) > 5 and pid[5] is not None:
            raise UnpicklingError("it has views of storages, which are not supported")
        if found.setdefault(key, (dtype, count)) != (dtype, count):
            raise UnpicklingError(f"its storage {key} has two sizes")
        # The offset follows the pickles.
        entries.setdefault(key, _Entry(key, 0, count * dtype.itemsize))
        return _Storage(archive, key, dtype)

    content, foreign = next_object(load)
    keys = next_object(nothing)[0]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(found):
        raise UnpicklingError("its list of storages is damaged")
    size = path.stat().st_size
    for key in keys:
        _, count = found[key]
        (stored,) = struct.unpack("<q", file.read(8))
        offset = file.tell()
        if stored != count or offset + entries[key].size > size:
            raise UnpicklingError(f"its storage {key} is cut off")
        entries[key] = replace(entries[key], offset=offset)
        file.seek(entries[key].size, os.SEEK_CUR)
    return content, foreign


def materialize(content: Any, archives: list[Any]) -> Any:
    """Copy an object with mapped, unverified tensors, and add their files to `archives`."""
    if isinstance(content, StoredTensor):
        if content.archive.entries[content.name].compressed is not None:
            raise ConversionError(
                f"{content.archive.path} is compressed, which torch never does, and which is not supported in "
                "DeepSpeed folders. Unpack it with unzip, and pack it again with zip -0."
            )
        if content.archive not in archives:
            archives.append(content.archive)
        return content.load(verify=False)
    if isinstance(content, dict):
        return {key: materialize(value, archives) for key, value in content.items()}
    if isinstance(content, list | tuple) and not isinstance(content, torch.Size):
        return type(content)([materialize(value, archives) for value in content])
    return content


__all__ = ["RangeCheck", "StoredTensor", "materialize", "open_torch_file", "range_check"]
