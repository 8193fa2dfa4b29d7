"""Files of `torch.save` from strangers: either the same tensors as from `torch.load`, or one error."""

import functools
import pickle
import random
import shutil
import struct
import sys
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from mgllava.conversion import ConversionError, read_checkpoint
from mgllava.model_files.torch_files import open_torch_file

from .torch_archives import Raw, archive, flip, legacy, repack

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16),
)


def _state():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = {f"dtype.{number}": (torch.randn(3, 5) * 9).to(dtype) for number, dtype in enumerate(DTYPES)}
    state |= {
        "view": base[1:, ::2],
        "transposed": base.T,
        "shared": base,
        "expanded": torch.arange(4.0)[:, None].expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "with attribute": torch.randn(3),
        "parameter with attribute": torch.nn.Parameter(torch.randn(3)),
    }
    state["with attribute"].note = state["parameter with attribute"].note = "kept by torch, not read here"
    return state


def _assert_same(tensors, state):
    assert list(tensors) == list(state)
    for name, value in state.items():
        loaded = tensors[name].load()
        assert (loaded.shape, loaded.dtype) == (value.shape, value.dtype), name
        # Bytes, since float8 cannot be compared.
        ours, theirs = (one.detach().contiguous().flatten().view(torch.uint8) for one in (loaded, value))
        assert ours.equal(theirs), name


LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("options", [{}, LEGACY, {"pickle_protocol": 4}])
def test_tensors_are_those_of_torch_load(tmp_path, options):
    state = _state()
    if options == LEGACY:
        state = {name: value for name, value in state.items() if name not in ("dtype.11", "dtype.12")}
    torch.save(state, tmp_path / "a.pth", **options)
    _assert_same(read_checkpoint(tmp_path / "a.pth").tensors, torch.load(tmp_path / "a.pth", weights_only=False))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dict_of_a_module_with_metadata_is_read(tmp_path, protocol):
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    assert isinstance(state, OrderedDict) and state._metadata
    meta = {"iter": 3, "data": b"raw\xff", "set": {1}, "frozen": frozenset({2}), "array": bytearray(b"x\xff")}
    meta |= {"complex": 1 + 2j, "count": Counter("aab"), "ordered": OrderedDict(a=1), "empty": bytearray()}
    meta |= {"size": torch.Size([3, 4]), "device": torch.device("cuda:1"), "dtype": torch.bfloat16}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "a.pth", pickle_protocol=protocol)
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    _assert_same(checkpoint.tensors, state)
    assert checkpoint.meta == meta


def test_tensors_are_mapped_and_aligned(tmp_path):
    """Without a copy where the file is aligned, as torch writes it; other tools do not align."""
    torch.save(_state(), tmp_path / "a.pth")
    repack(tmp_path / "a.pth", tmp_path / "b.pth", zipfile.ZIP_STORED)
    for tensor in read_checkpoint(tmp_path / "a.pth").tensors.values():
        assert tensor.load().data_ptr() == tensor.load().data_ptr()
    for tensor in read_checkpoint(tmp_path / "b.pth").tensors.values():
        assert tensor.load().data_ptr() % tensor.dtype.itemsize == 0


def test_legacy_files_are_little_endian_whatever_machine_wrote_them(tmp_path):
    torch.save({"a": torch.arange(5.0)}, tmp_path / "a.pth", **LEGACY)
    content = (tmp_path / "a.pth").read_bytes()
    place = content.index(pickle.NEWTRUE, content.index(b"little_endian"))
    (tmp_path / "b.pth").write_bytes(content[:place] + pickle.NEWFALSE + content[place + 1 :])
    expected = torch.load(tmp_path / "b.pth", weights_only=True)
    assert expected["a"].equal(torch.arange(5.0))
    _assert_same(read_checkpoint(tmp_path / "b.pth").tensors, expected)


def test_other_byte_order_is_swapped(tmp_path):
    state = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.arange(7).to(torch.uint8)}
    torch.save(state, tmp_path / "a.pth")
    other = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, other if info.filename.endswith("byteorder") else old.read(info))
    expected = torch.load(tmp_path / "b.pth", weights_only=True)
    assert not expected["a"].equal(state["a"])
    _assert_same(read_checkpoint(tmp_path / "b.pth").tensors, expected)


# Compressed and damaged files


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_that_was_packed_again_gives_the_same_tensors(tmp_path, method):
    # Other tools compress the storages, or at least do not align them.
    torch.save(_state(), tmp_path / "a.pth")
    repacked = repack(tmp_path / "a.pth", tmp_path / "b.pth", method)
    _assert_same(read_checkpoint(repacked).tensors, torch.load(tmp_path / "a.pth", weights_only=True))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path, method):
    torch.save(_state(), tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="packed in a way that is not supported"):
        read_checkpoint(repack(tmp_path / "a.pth", tmp_path / "b.pth", method))


@pytest.mark.parametrize("method", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_flipped_bit_is_an_error_or_changes_nothing(tmp_path, method):
    state = {name: value for name, value in _state().items() if not name.startswith("dtype.")}
    whole, path = tmp_path / "whole.pth", tmp_path / "a.pth"
    torch.save(state, path)
    shutil.copy(path, whole) if method is None else repack(path, whole, method)
    size, errors = whole.stat().st_size, 0
    for position in random.Random(0).sample(range(size), 150):
        shutil.copy(whole, path)
        flip(path, position)
        try:
            _assert_same(read_checkpoint(path).tensors, state)
        except ConversionError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            errors += 1
    assert errors > 10


def test_file_without_checksums_is_read(tmp_path):
    # torch.serialization.set_crc32_options(False) writes zeros.
    options = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(_state(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(options)
    _assert_same(read_checkpoint(tmp_path / "a.pth").tensors, torch.load(tmp_path / "a.pth", weights_only=True))


def test_every_file_that_is_cut_off_is_named(tmp_path):
    for zipped in (True, False):
        torch.save(
            {"a": torch.randn(4, 4), "b": torch.arange(3)}, tmp_path / "whole", _use_new_zipfile_serialization=zipped
        )
        whole, path = (tmp_path / "whole").read_bytes(), tmp_path / "cut.pth"
        for length in [*range(0, len(whole), 37), len(whole) - 1]:
            path.write_bytes(whole[:length])
            with pytest.raises(ConversionError, match=r"cut\.pth cannot be read as a torch file"):
                read_checkpoint(path)


def test_sizes_in_the_zip_directory_are_checked(tmp_path):
    # A storage of 4 GB, and a tensor that reaches beyond its storage.
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    deflated = repack(tmp_path / "a.pth", tmp_path / "b.pth", zipfile.ZIP_DEFLATED, "data/0")
    content = deflated.read_bytes()
    size = struct.pack("<I", 4 << 20)
    assert content.count(size) == 2
    deflated.write_bytes(content.replace(size, struct.pack("<I", 4_000_000_000)))
    with pytest.raises(ConversionError, match="has 4000000000 bytes, expected 4194304"):
        read_checkpoint(deflated)
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "c.pth", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, b"1234" if info.filename.endswith("data/0") else old.read(info))
    with pytest.raises(ConversionError, match="has 4 bytes, expected 4194304"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "cannot be read"),
        (b"PK\x05\x06" + b"\0" * 18, "empty archive"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, said):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ConversionError, match=said):
        read_checkpoint(tmp_path / "a.pth")


def test_torchscript_and_sparse_tensors_are_refused_by_name(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    with pytest.raises(ConversionError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pth", trust_pickle=True)
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    with pytest.raises(ConversionError, match="sparse, quantized"):
        read_checkpoint(tmp_path / "sparse.pth")
    torch.save({"a": torch.complex(torch.ones(2), torch.ones(2)).conj().imag}, tmp_path / "negated.pth")
    with pytest.raises(ConversionError, match="lazy view"):
        read_checkpoint(tmp_path / "negated.pth")


# Hostile pickles


TARGETS = (
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter"),
    *("torch._tensor._rebuild_from_type_v2", "collections.OrderedDict", "collections.Counter", "torch.Size"),
    *("torch.device", "torch.float32", "torch.FloatStorage", "torch.storage.UntypedStorage", "torch.Tensor"),
    *("torch.nn.parameter.Parameter", "builtins.set", "builtins.frozenset", "builtins.bytearray", "_codecs.encode"),
    *("os.system", "builtins.eval", "torch.nn.Linear", "torch", "builtins.dict", "deepspeed.runtime.engine.Engine"),
)


@functools.cache
def _real(name):
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), attribute, None)


def _snapshot():
    """Record what a pickle might change in this process."""
    found = {}
    for name in TARGETS:
        value = _real(name)
        found[name] = (id(value), getattr(value, "__defaults__", None), repr(getattr(value, "__kwdefaults__", None)))
        found[f"{name}.__dict__"] = {key: id(entry) for key, entry in getattr(value, "__dict__", {}).items()}
    found["torch"] = {key: id(value) for key, value in vars(torch).items() if key != "__warningregistry__"}
    return found


def _set_defaults():
    """Start a pickle that changes the defaults of the function that rebuilds tensors."""
    name = "torch._utils._rebuild_tensor_v2"
    return Raw().name(name).value((None, {"__defaults__": ({"neg": True},)})).op(pickle.BUILD)


@pytest.mark.parametrize("write", [archive, legacy])
@pytest.mark.parametrize("target", TARGETS)
def test_pickle_does_not_set_attributes_of_what_it_names(tmp_path, write, target):
    before = _snapshot()
    for state in (
        {"__defaults__": (True,), "__call__": 1, "a": 2},
        (None, {"__defaults__": (True,), "b": 1}),
        {"x": 1},
    ):
        for code in (pickle.BUILD, pickle.SETITEMS, pickle.APPENDS, pickle.ADDITEMS):
            raw = Raw().name(target)
            if code == pickle.BUILD:
                raw.value(state).op(code)
            else:
                raw.op(pickle.MARK).value("__defaults__").value((True,)).op(code)
            path = write(tmp_path / "a.pth", raw.bytes())
            for options in ({}, {"trust_pickle": True}, {"inert_modules": ("torch", "collections", "builtins")}):
                with pytest.raises(ConversionError):
                    open_torch_file(path, **options)
    assert _snapshot() == before


def test_rebuilding_of_good_files_is_not_changed_by_a_bad_one(tmp_path):
    good = {"a": torch.randn(4)}
    torch.save(good, tmp_path / "good.pth")
    data = _set_defaults().op(pickle.POP).value({}).bytes()
    with pytest.raises(ConversionError):
        read_checkpoint(archive(tmp_path / "bad.pth", data), trust_pickle=True)
    _assert_same(read_checkpoint(tmp_path / "good.pth").tensors, good)
    assert torch.load(tmp_path / "good.pth", weights_only=True)["a"].equal(good["a"])
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


def test_deepspeed_folder_does_not_set_attributes_either(tmp_path):
    before = _snapshot()
    archive(tmp_path / "mp_rank_00_model_states.pt", _set_defaults().bytes())
    with pytest.raises(ConversionError):
        read_checkpoint(tmp_path)
    assert _snapshot() == before


def test_trusted_legacy_file_writes_nothing(tmp_path):
    # A class with its source code, for which torch.load may write a patch file.
    target = tmp_path / "victim"
    target.write_text("mine")
    raw = Raw().op(pickle.MARK).value("module").name("argparse.Namespace").value(str(target))
    raw.value("class Namespace: pass").op(pickle.TUPLE).op(pickle.BINPERSID)
    path = legacy(tmp_path / "a.pth", raw.bytes())
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(ConversionError, match="must hold a state dict"):
        read_checkpoint(path, trust_pickle=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before and target.read_text() == "mine"


@pytest.mark.parametrize(
    "raw",
    [
        Raw().value(1).op(pickle.LONG_BINPUT, struct.pack("<I", 0xFFFFFFF0)),
        Raw().value(1).op(pickle.PUT, b"99999999999\n"),
        Raw().name("builtins.bytearray").value((10**13,)).op(pickle.REDUCE),
        Raw().op(pickle.EXT1, b"\1"),
        Raw().op(pickle.PERSID, b"storage\n"),
        Raw().op(pickle.BINUNICODE8, struct.pack("<Q", 1 << 62)),
        Raw().op(pickle.FRAME, struct.pack("<Q", 1 << 62)),
        Raw().op(pickle.MARK * 100_000),
        Raw().op(pickle.NONE * 6_000_000),
        Raw().op(pickle.EMPTY_LIST + pickle.MARK).op(pickle.EMPTY_TUPLE + pickle.TUPLE1 * 200_000).op(pickle.APPENDS),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("write", [archive, legacy])
def test_pickle_bombs_are_one_error(tmp_path, raw, write):
    with pytest.raises(ConversionError):
        read_checkpoint(write(tmp_path / "a.pth", raw.bytes()), trust_pickle=True)


@pytest.mark.parametrize("seed", range(4))
def test_random_pickles_end_in_an_error_and_change_nothing(tmp_path, seed):
    chosen = random.Random(seed)
    numbers, texts = (0, -1, 1 << 40, 2.5, None, True), ("a", b"b")
    values = [*numbers, *texts, (), [], {}, (1, 2), ("0",), {"neg": True}, {"__defaults__": (1,)}]
    names = (
        "REDUCE BUILD NEWOBJ SETITEM APPEND TUPLE1 TUPLE2 TUPLE3 POP DUP BINPERSID MARK TUPLE LIST DICT APPENDS "
        "SETITEMS POP_MARK EMPTY_SET ADDITEMS NEWOBJ_EX STACK_GLOBAL MEMOIZE OBJ FROZENSET"
    )
    simple = [*(getattr(pickle, name) for name in names.split()), pickle.BINGET + b"\0", pickle.BINGET + b"\1"]
    before = _snapshot()
    path = tmp_path / "a.pth"
    for _ in range(400):
        raw = Raw()
        for _ in range(chosen.randrange(2, 25)):
            kind = chosen.random()
            if kind < 0.3:
                raw.name(chosen.choice(TARGETS))
            elif kind < 0.55:
                raw.value(chosen.choice(values))
            elif kind < 0.6:
                raw.op(pickle.MARK).value("storage").name("torch.FloatStorage").value("0").value("cpu").value(4)
                raw.op(pickle.TUPLE).op(pickle.BINPERSID)
            else:
                raw.op(chosen.choice(simple))
        write = chosen.choice([archive, legacy])
        try:
            open_torch_file(write(path, raw.bytes()), trust_pickle=chosen.random() < 0.5)
            read_checkpoint(path, trust_pickle=chosen.random() < 0.5)
        except ConversionError as error:
            assert "\n" not in str(error)
    assert _snapshot() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(("number", "ending"), [(10, "name_09. "), (11, "name_09 and 1 more. ")])
def test_long_lists_of_refused_names_are_cut(tmp_path, number, ending):
    names = "".join(f"cstrange\nname_{index:02}\n0" for index in range(number))
    state = pickle.dumps({"weight": 1}, protocol=0)
    path = tmp_path / "many.pth"
    torch.save({"weight": torch.ones(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, names.encode() + state if name.endswith("data.pkl") else data)
    with pytest.raises(ConversionError) as error:
        read_checkpoint(path)
    assert "it names strange.name_00, " in str(error.value) and f"strange.{ending}" in str(error.value)
