"""Write, repack and damage files of `torch.save`."""

import io
import pickle
import struct
import zipfile

STORAGE = struct.pack("<4f", 1, 2, 3, 4)


class Raw:
    """Builds a pickle from single operations."""

    def __init__(self):
        self.out = io.BytesIO()
        self.out.write(pickle.PROTO + b"\2")

    def op(self, code, argument=b""):
        self.out.write(code + argument)
        return self

    def name(self, full):
        module, _, name = full.rpartition(".")
        return self.op(pickle.GLOBAL, f"{module}\n{name}\n".encode())

    def value(self, value):
        # Protocol 2 without its first two bytes and the last.
        return self.op(pickle.dumps(value, 2)[2:-1])

    def storage(self, kind="torch.FloatStorage", key="0", count=4, view=()):
        """Refer to a storage, which the file has under this key. In old files, the end tells of what it is a view."""
        self.op(pickle.MARK).value("storage").name(kind)
        for part in (key, "cpu", count, *view):
            self.value(part)
        return self.op(pickle.TUPLE + pickle.BINPERSID)

    def tensor(self, offset=0, shape=(4,), strides=(1,), **storage):
        """Build a tensor as torch does."""
        self.name("torch._utils._rebuild_tensor_v2").op(pickle.MARK).storage(**storage)
        for part in (offset, shape, strides, False):
            self.value(part)
        self.name("collections.OrderedDict").op(pickle.EMPTY_TUPLE + pickle.REDUCE)
        return self.op(pickle.TUPLE + pickle.REDUCE)

    def bytes(self):
        return self.out.getvalue() + pickle.STOP


def state(*tensors, **storage):
    """Pickle a state dict with the tensors `a`, `b` and so on, each from the arguments of `Raw.tensor`."""
    raw = Raw().op(pickle.EMPTY_DICT)
    for name, tensor in zip("abc", tensors, strict=False):
        raw.value(name).tensor(**{**storage, **tensor}).op(pickle.SETITEM)
    return raw.bytes()


def archive(path, data, **entries):
    """Write an archive with this pickle, the storage `0`, and further entries."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/version", b"3\n")
        file.writestr("a/data/0", STORAGE)
        for name, content in entries.items():
            file.writestr(f"a/{name}", content)
    return path


def legacy(path, data, start=(0x1950A86A20F9469CFC6C, 1001), keys=(), storages=b""):
    """Write a file in the layout before torch 1.6."""
    parts = [*start, {"protocol_version": 1001, "little_endian": True}]
    ends = pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2) + storages
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts) + data + ends)
    return path


def repack(source, target, method, names=None):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            chosen = method if names is None or info.filename.endswith(names) else zipfile.ZIP_STORED
            new.writestr(info.filename, old.read(info), compress_type=chosen)
    return target


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


def places(path, part):
    """Yield the ranges of the bytes of all entries whose names contain a part."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if part in info.filename and info.file_size:
                file.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                yield range(
                    info.header_offset + 30 + name + extra, info.header_offset + 30 + name + extra + info.compress_size
                )
