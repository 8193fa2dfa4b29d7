"""Tensors, storages and archives in files of `torch.save` that are built byte by byte."""

import io
import pickle
import struct
import zipfile
import zlib

import pytest
import torch

from mgllava.conversion import ConversionError, read_checkpoint
from mgllava.model_files import torch_files
from mgllava.model_files.restricted_pickle import read_pickle
from mgllava.model_files.torch_files import materialize, open_torch_file, range_check

from .torch_archives import STORAGE, Raw, archive, flip, legacy, places, repack, state

LONGEST = (1 << 48) - 1
# The end of a file before torch 1.6 with one storage.
GOOD = {"keys": ("0",), "storages": struct.pack("<q", 4) + STORAGE}


def _refused(path, said, **options):
    with pytest.raises(ConversionError, match=said) as error:
        open_torch_file(path, **options)
    assert str(path) in str(error.value)


def _edit_directory(path, name, offset, form, value):
    """Change a field of an entry in the directory at the end of an archive."""
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\1\2", 0, content.rindex(name.encode()))
    struct.pack_into(form, content, place + offset, value)
    path.write_bytes(content)


# Where fields are in an entry of the directory of a zip file, by its specification.
FLAGS, CHECKSUM, PACKED_SIZE, SIZE, PLACE = (8, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (42, "<I")

# Tensors


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (4,), (1,)),
        (3, (1,), (1,)),
        (3, (), ()),
        (1, (3,), (1,)),
        (0, (2, 2), (1, 2)),
        (0, (2, 2), (2, 1)),
        (2, (5, 2), (0, 1)),
        (0, (0, 9), (9, 1)),
        (1, (2,), (2,)),
        (0, (1,) * 64, (1,) * 64),
    ],
)
def test_tensors_inside_their_storage_are_those_of_torch(tmp_path, offset, shape, strides):
    tensor = {"offset": offset, "shape": shape, "strides": strides}
    for path in (
        archive(tmp_path / "a.pth", state(tensor)),
        legacy(tmp_path / "b.pth", state(tensor, view=(None,)), **GOOD),
    ):
        tensor = read_checkpoint(path).tensors["a"]
        expected = torch.load(path, weights_only=True)["a"]
        assert tensor.load().equal(expected) and tensor.load().stride() == expected.stride()
        assert (tensor.shape, tensor.nbytes) == (expected.shape, expected.nbytes)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "said"),
    [
        (4, (), (), "reaches to item 4 of the 4 in a/data/0"),
        (4, (1,), (1,), "reaches to item 4"),
        (1, (4,), (1,), "reaches to item 4"),
        (0, (2, 3), (2, 1), "reaches to item 4"),
        (0, (3, 1), (2, 1), "reaches to item 4"),
        (-1, (1,), (1,), "impossible sizes"),
        (0, (-1,), (1,), "impossible sizes"),
        (3, (2,), (-1,), "impossible sizes"),
        (0, (2, 2), (1,), "impossible sizes"),
        (0, [2], (1,), "impossible sizes"),
        (0, (2,), [1], "impossible sizes"),
        (0, (2.0,), (1,), "impossible sizes"),
        (True, (1,), (1,), "impossible sizes"),
        (0, (LONGEST + 1,), (0,), "impossible sizes"),
        (0, (1,) * 65, (1,) * 65, "impossible sizes"),
    ],
)
def test_tensors_outside_their_storage_and_impossible_ones_are_refused(tmp_path, offset, shape, strides, said):
    _refused(archive(tmp_path / "a.pth", state({"offset": offset, "shape": shape, "strides": strides})), said)


def test_longest_tensor_is_opened(tmp_path):
    path = archive(tmp_path / "a.pth", state({"shape": (LONGEST,), "strides": (0,)}))
    assert open_torch_file(path)["a"].shape == (LONGEST,)


def _rebuilt(function, *arguments):
    """Call a function of torch that rebuilds tensors; arguments are values, or functions that append to the pickle."""
    raw = Raw().op(pickle.EMPTY_DICT).value("a").name(function).op(pickle.MARK)
    for argument in arguments:
        argument(raw) if callable(argument) else raw.value(argument)
    return raw.op(pickle.TUPLE + pickle.REDUCE + pickle.SETITEM).bytes()


def _name(full):
    return lambda raw: raw.name(full)


def _parts(raw):
    """Arguments of a tensor, in a tuple."""
    raw.op(pickle.MARK).storage().value(0).value((4,)).value((1,)).value(False).value({})
    return raw.op(pickle.TUPLE)


V2, FROM_TYPE = "torch._utils._rebuild_tensor_v2", "torch._tensor._rebuild_from_type_v2"


@pytest.mark.parametrize(
    "kind", ["torch.Tensor", "torch._tensor.Tensor", "torch.nn.Parameter", "torch.nn.parameter.Parameter"]
)
def test_tensors_with_attributes_are_read_under_each_name_of_their_class(tmp_path, kind):
    data = _rebuilt(FROM_TYPE, _name(V2), _name(kind), _parts, {"note": "x"})
    assert read_checkpoint(archive(tmp_path / "a.pth", data)).tensors["a"].load().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_rebuilt(V2, "0", 0, (4,), (1,), False, {}), "something that is not a storage"),
        (_rebuilt(V2, Raw.storage, 0, (4,), (1,), False, {}, {"neg": True}), "lazy view"),
        (
            _rebuilt("torch._utils._rebuild_tensor_v3", Raw.storage, 0, (4,), (1,), False, {}, "float32"),
            "unknown dtype",
        ),
        (_rebuilt(FROM_TYPE, _name(V2), _name("os.system"), _parts, {}), "names os.system"),
        (_rebuilt(FROM_TYPE, _name(V2), "torch.Tensor", _parts, {}), "a class of its own"),
        (_rebuilt(FROM_TYPE, V2, _name("torch.Tensor"), _parts, {}), "a class of its own"),
        (_rebuilt(FROM_TYPE, _name(V2), _name("torch.Tensor"), [0], {}), "a class of its own"),
    ],
)
def test_tensors_that_are_built_from_something_else_are_refused(tmp_path, data, said):
    _refused(archive(tmp_path / "a.pth", data), said)


# Storages


@pytest.mark.parametrize(("dtype", "name"), torch.storage._dtype_to_storage_type_map().items(), ids=str)
@pytest.mark.parametrize("module", ["torch", "torch.cuda", "torch.storage"])
def test_storages_have_the_dtype_that_torch_names(tmp_path, dtype, name, module):
    items = 16 // dtype.itemsize
    data = state({"shape": (items,), "kind": f"{module}.{name}", "count": items})
    path = archive(tmp_path / "a.pth", data)
    if name.startswith("Q"):  # of quantized tensors
        with pytest.raises(ConversionError):
            read_checkpoint(path)
    else:
        tensor = read_checkpoint(path).tensors["a"]
        assert tensor.dtype == dtype and tensor.load().view(torch.uint8).numpy().tobytes() == STORAGE


@pytest.mark.parametrize("write", [archive, legacy])
@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (lambda raw: raw.storage(count=-1), "impossible storage"),
        (lambda raw: raw.storage(count=4.0), "impossible storage"),
        (lambda raw: raw.storage(count=True), "impossible storage"),
        (lambda raw: raw.storage(count=LONGEST + 1), "impossible storage"),
        (lambda raw: raw.storage(key=0), "impossible storage"),
        (lambda raw: raw.storage(kind="collections.OrderedDict"), "something that is not a storage"),
        (lambda raw: raw.value("storage").op(pickle.BINPERSID), "something that is not a storage"),
        (lambda raw: raw.value(("storage",)).op(pickle.BINPERSID), "something that is not a storage"),
        (lambda raw: raw.value(("other", 1, "0", "cpu", 4)).op(pickle.BINPERSID), "something that is not a storage"),
        (lambda raw: raw.value(("storage", "FloatStorage", "0", "cpu", 4)).op(pickle.BINPERSID), "is not a storage"),
    ],
)
def test_references_to_no_storage_are_refused(tmp_path, write, reference, said):
    _refused(write(tmp_path / "a.pth", reference(Raw()).bytes()), said)


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ({"count": LONGEST}, f"storage 0 has 16 bytes, expected {4 * LONGEST}"),
        ({"count": 3}, "storage 0 has 16 bytes, expected 12"),
        ({"key": "1" * 50}, f"storage {'1' * 40} is missing"),
        ({"key": "../data.pkl"}, "is missing"),
    ],
)
def test_storages_that_an_archive_lacks_are_named(tmp_path, storage, said):
    _refused(archive(tmp_path / "a.pth", state({"shape": (1,), **storage})), said)


# The layout before torch 1.6


@pytest.mark.parametrize(
    ("tensors", "changes", "said"),
    [
        ([{}], {"start": (5, 1001)}, "does not start like a torch file"),
        ([{}], {"start": (0x1950A86A20F9469CFC6C, 1002)}, "does not start like a torch file"),
        ([{}], {"keys": ()}, "list of storages is damaged"),
        ([{}], {"keys": ("0", "1")}, "list of storages is damaged"),
        ([{}], {"keys": (0,)}, "list of storages is damaged"),
        ([{}], {"keys": "0"}, "list of storages is damaged"),
        ([{}], {"keys": Raw().storage()}, "a storage outside the state dict"),
        ([{}], {"storages": struct.pack("<q", 3) + STORAGE}, "storage 0 is cut off"),
        ([{}], {"storages": struct.pack("<q", 5) + STORAGE + b"1234"}, "storage 0 is cut off"),
        ([{}], {"storages": struct.pack("<q", 4) + STORAGE[:-1]}, "storage 0 is cut off"),
        ([{"count": LONGEST}], {"storages": struct.pack("<q", LONGEST) + STORAGE}, "storage 0 is cut off"),
        ([{}, {"shape": (2,), "count": 2}], {}, "storage 0 has two sizes"),
        ([{}, {"kind": "torch.IntStorage"}], {}, "storage 0 has two sizes"),
        ([{"view": (("1", 0, 2),)}], {}, "views of storages"),
    ],
)
def test_old_files_with_damaged_parts_are_refused(tmp_path, tensors, changes, said):
    changes = {**GOOD, **changes}
    data = state(*tensors, view=(None,))
    if isinstance(changes["keys"], Raw):
        data += changes.pop("keys").bytes()
    _refused(legacy(tmp_path / "a.pth", data, **changes), said)


def test_old_files_with_several_storages_are_those_of_torch(tmp_path):
    tensors = ({"key": "7"}, {"key": "3", "count": 2, "shape": (2,), "kind": "torch.LongStorage"}, {"key": "7"})
    content = struct.pack("<q2q", 2, -5, 6) + struct.pack("<q", 4) + STORAGE
    path = legacy(tmp_path / "a.pth", state(*tensors, view=(None,)), keys=("3", "7"), storages=content)
    found, expected = read_checkpoint(path).tensors, torch.load(path, weights_only=True)
    assert found.keys() == expected.keys() == set("abc")
    assert all(found[name].load().equal(value) for name, value in expected.items())
    assert found["b"].load().tolist() == [-5, 6]


# Archives


@pytest.mark.parametrize(("bit", "is_refused"), [(0, True), (3, False), (5, True), (6, True), (11, False)])
def test_encrypted_and_patched_entries_are_refused(tmp_path, bit, is_refused):
    """By the bits of the zip specification; the others say how sizes and names are written."""
    path = archive(tmp_path / "a.pth", state({}))
    _edit_directory(path, "a/data/0", *FLAGS, 1 << bit)
    if is_refused:
        _refused(path, "its entry a/data/0 is encrypted")
    else:
        assert read_checkpoint(path).tensors["a"].load().tolist() == [1, 2, 3, 4]


def test_entries_that_share_bytes_are_refused(tmp_path):
    path = archive(tmp_path / "a.pth", state({}, {"key": "1"}), **{"data/1": STORAGE})
    with zipfile.ZipFile(path) as file:
        first = file.getinfo("a/data/0").header_offset
    _edit_directory(path, "a/data/1", *PLACE, first)
    _refused(path, "its entry a/data/1 is not where the directory says")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (PLACE, 1, "is not where the directory says"),
        (PACKED_SIZE, 10**6, "is cut off"),
        (PACKED_SIZE, 12, "has two sizes"),
        (SIZE, 12, "has two sizes"),
    ],
)
def test_directory_that_does_not_fit_the_entries(tmp_path, field, value, said):
    path = archive(tmp_path / "a.pth", state({"count": 3, "shape": (3,)}))
    _edit_directory(path, "a/data/0", *field, value)
    _refused(path, said)


def test_archives_of_other_kinds_are_named(tmp_path):
    data = state({})
    _refused(archive(tmp_path / "a.pth", data, byteorder=b"middle"), "its byte order is unknown")
    _refused(archive(tmp_path / "b.pth", data, **{"constants.pkl": b""}), "TorchScript")
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as file:
        file.writestr("a/other.pkl", data)
    _refused(tmp_path / "c.pth", r"it has no data\.pkl")
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(tmp_path / "d.pth", data, **{"data/0": STORAGE})
    _refused(tmp_path / "d.pth", "two entries with the same name")


@pytest.mark.parametrize(("more", "is_refused"), [(0, False), (1, True)])
def test_pickle_of_more_than_a_gibibyte_is_not_read(tmp_path, more, is_refused):
    path = repack(archive(tmp_path / "a.pth", state({})), tmp_path / "b.pth", zipfile.ZIP_DEFLATED)
    _edit_directory(path, "a/data.pkl", *SIZE, (1 << 30) + more)
    if is_refused:
        _refused(path, r"its entry a/data\.pkl is too large")
    else:
        assert open_torch_file(path).keys() == {"a"}


def test_compressed_entry_that_is_shorter_than_the_directory_says_is_damaged(tmp_path):
    data = state({"count": 8, "shape": (8,)})
    path = repack(archive(tmp_path / "a.pth", data), tmp_path / "b.pth", zipfile.ZIP_DEFLATED, "data/0")
    _edit_directory(path, "a/data/0", *SIZE, 32)
    with pytest.raises(ConversionError, match="its entry a/data/0 does not have the checksum"):
        read_checkpoint(path).tensors["a"].load()


# Checksums


@pytest.fixture
def damaged(tmp_path):
    """A file with one changed byte in its second storage."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(1000.0), "b": torch.arange(1000.0, 2000.0)}, path)
    (place,) = places(path, "data/1")
    flip(path, place[1234])
    return path


def test_entries_are_verified_once_and_by_themselves(damaged, monkeypatch):
    checked = []
    crc32 = zlib.crc32
    monkeypatch.setattr(torch_files.zlib, "crc32", lambda *given: checked.append(len(given[0])) or crc32(*given))
    tensors = read_checkpoint(damaged).tensors
    checked.clear()
    for _ in range(2):
        assert tensors["a"].load().equal(torch.arange(1000.0))
        assert checked == [4000]
        with pytest.raises(ConversionError, match="its entry a/data/1 does not have the checksum"):
            tensors["b"].load()
        checked.remove(4000)


@pytest.mark.parametrize("size", [1, 1000, 4096, 10**6])
def test_file_that_is_read_from_start_to_end_is_verified_on_the_way(damaged, size):
    assert range_check(damaged) is None  # not in use
    opened = open_torch_file(damaged)
    content = damaged.read_bytes()

    def read(content):
        check = range_check(damaged)
        for start in range(0, len(content), size):
            check.update(content[start : start + size], start)
        check.finish()

    with pytest.raises(ConversionError, match="its entry a/data/1 does not have the checksum"):
        read(content)
    flip(damaged, next(places(damaged, "data/1"))[1234])
    opened = open_torch_file(damaged)
    read(damaged.read_bytes())
    last = max(places(damaged, ""), key=lambda place: place.start)
    with pytest.raises(ConversionError, match="does not have the checksum"):
        read(damaged.read_bytes()[: last.stop - 1])
    assert opened["b"].load().equal(torch.arange(1000.0, 2000.0))


def test_objects_are_copied_before_their_tensors_are_verified(damaged, tmp_path):
    opened = open_torch_file(damaged)
    content = {"a": [opened["a"], (opened["b"], 3)], "size": torch.Size([2]), "text": "x"}
    archives = []
    copied = materialize(content, archives)
    assert copied["a"][0].equal(torch.arange(1000.0)) and type(copied["a"][1]) is tuple and copied["a"][1][1] == 3
    assert copied["size"] == torch.Size([2]) and type(copied["size"]) is torch.Size and copied["text"] == "x"
    assert len(archives) == 1
    with pytest.raises(ConversionError, match="its entry a/data/1 does not have the checksum"):
        archives[0].verify()
    flip(damaged, next(places(damaged, "data/1"))[1234])
    packed = open_torch_file(repack(damaged, tmp_path / "b.pth", zipfile.ZIP_DEFLATED))
    with pytest.raises(ConversionError, match=r"b\.pth is compressed"):
        materialize(packed, [])


# Pickles


@pytest.mark.parametrize("value", ["x" * 1000, b"x" * 1000, [1] * 1000, 10**1000])
@pytest.mark.parametrize("protocol", [0, 2])
def test_one_of_several_pickles_is_read_up_to_a_limit(value, protocol):
    data = pickle.dumps(value, protocol)
    file = io.BytesIO(b"before" + data + b"after")
    file.seek(6)
    assert read_pickle(file, len(data) + 1) == data and file.read() == b"after"
    file.seek(6)
    with pytest.raises(pickle.UnpicklingError, match="its pickle is too large"):
        read_pickle(file, len(data) // 2)
