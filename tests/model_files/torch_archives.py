"""Repack and damage files of `torch.save`."""

import struct
import zipfile


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
