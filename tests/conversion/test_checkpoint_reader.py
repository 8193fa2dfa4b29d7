import os
import shutil
import sys
import types

import pytest
import torch

from mgllava.conversion import ConversionError, read_checkpoint
from mgllava.model_files.tensor_files import open_weights
from tests.model_files.torch_archives import flip, places

from .zero_folders import write_zero


def _assert_same(tensors, state):
    assert tensors.keys() == state.keys()
    for name, value in state.items():
        assert tensors[name].shape == tuple(value.shape)
        torch.testing.assert_close(tensors[name].load(), value, rtol=0, atol=0)


def test_mmengine_file_is_read_lazily_with_its_meta(golden, golden_state):
    checkpoint = read_checkpoint(golden / "xtuner" / "iter_10.pth")
    _assert_same(checkpoint.tensors, golden_state("iter_10.pth"))
    assert checkpoint.meta["iter"] == 10
    assert "image_size_aux = 768" in checkpoint.config_text


def test_pickled_objects_are_refused_by_name(golden):
    with pytest.raises(
        ConversionError, match=r"mmengine\.logging\.history_buffer\.HistoryBuffer.*`trust_pickle=True`"
    ):
        read_checkpoint(golden / "xtuner" / "iter_5_with_message_hub.pth")


def test_trusted_pickle_is_read_without_mmengine(golden, golden_state):
    assert "mmengine" not in sys.modules
    checkpoint = read_checkpoint(golden / "xtuner" / "iter_5_with_message_hub.pth", trust_pickle=True)
    _assert_same(checkpoint.tensors, golden_state("iter_5_pretrain.pth"))
    assert "mmengine" not in sys.modules


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path, zipped):
    fuse, path = tmp_path / "fuse", tmp_path / "bomb.pth"
    state = {"weight": torch.arange(3.0)}
    torch.save({"state_dict": state, "hub": _Bomb(fuse)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match="`trust_pickle=True`"):
        read_checkpoint(path)
    _assert_same(read_checkpoint(path, trust_pickle=True).tensors, state)
    assert not fuse.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {"weight": 3}}])
def test_file_without_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ConversionError, match="must hold a state dict"):
        read_checkpoint(tmp_path / "other.pth")


def test_missing_path_and_foreign_folder_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(ConversionError, match="is not a DeepSpeed checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world_size", [1, 3])
def test_zero_folder_equals_the_plain_state(tmp_path, golden_state, stage, world_size):
    pytest.importorskip("deepspeed")
    state = golden_state("iter_10.pth")
    frozen = {"visual_encoder.vision_model.pre_layrnorm.weight": torch.randn(7).bfloat16()}
    extra = {"meta": {"iter": 10, "cfg": "image_size_aux = 768"}}
    folder = write_zero(
        tmp_path / "iter_10.pth", state, stage=stage, world_size=world_size, frozen=frozen, extra=extra
    )
    checkpoint = read_checkpoint(folder)
    _assert_same(checkpoint.tensors, {**frozen, **state})
    assert checkpoint.meta == extra["meta"]
    assert len(checkpoint.files) == (2 * world_size if stage == 3 else world_size + 1)
    (tmp_path / "latest").write_text("iter_10.pth")
    assert read_checkpoint(tmp_path).files == checkpoint.files


def test_zero_model_file_without_optimizer_states(tmp_path, golden_state):
    state = golden_state("iter_5_pretrain.pth")
    torch.save({"module": state, "meta": {"iter": 5}}, tmp_path / "mp_rank_00_model_states.pt")
    _assert_same(read_checkpoint(tmp_path).tensors, state)


def test_zero_with_lost_files_is_refused(tmp_path, golden_state):
    pytest.importorskip("deepspeed")
    folder = write_zero(tmp_path / "iter", golden_state("iter_5_pretrain.pth"), stage=3)
    optimizer_files = sorted(folder.glob("*_optim_states.pt"))
    optimizer_files[1].unlink()
    with pytest.raises(ConversionError, match="Expected 2 of"):
        read_checkpoint(folder)
    optimizer_files[0].unlink()
    with pytest.raises(ConversionError, match="stage 3 checkpoint without"):
        read_checkpoint(folder)


def test_zero_with_foreign_objects_needs_trust(tmp_path, golden_state, monkeypatch):
    pytest.importorskip("deepspeed")
    runner = types.ModuleType("foreign_runner")
    runner.History = type("History", (), {"__module__": "foreign_runner"})
    state = golden_state("iter_5_pretrain.pth")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "foreign_runner", runner)
        folder = write_zero(tmp_path / "iter", state, stage=2, extra={"message_hub": runner.History()})
    with pytest.raises(ConversionError, match=r"foreign_runner\.History.*`trust_pickle=True`"):
        read_checkpoint(folder)
    _assert_same(read_checkpoint(folder, trust_pickle=True).tensors, state)


def test_missing_deepspeed_names_the_extra(tmp_path, golden_state, monkeypatch):
    pytest.importorskip("deepspeed")
    folder = write_zero(tmp_path / "iter", golden_state("iter_5_pretrain.pth"), stage=2)
    monkeypatch.setitem(sys.modules, "deepspeed.utils", None)
    with pytest.raises(ConversionError, match=r"pip install -e '\.\[zero\]'"):
        read_checkpoint(folder)


def test_truncated_safetensors_is_named(tmp_path, golden):
    whole = (golden / "llm" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ConversionError, match="truncated"):
        open_weights(tmp_path)


def test_zero_partitions_are_joined_on_disk(tmp_path, golden_state, monkeypatch):
    pytest.importorskip("deepspeed")
    state = golden_state("iter_5_pretrain.pth")
    folder = write_zero(tmp_path / "iter", state, stage=2)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1 if path == scratch else 0)
    )
    with pytest.raises(ConversionError, match=r"Not enough disk space in .*scratch"):
        read_checkpoint(folder, scratch=scratch)
    monkeypatch.undo()
    checkpoint = read_checkpoint(folder, scratch=scratch)
    # The temporary file has no name, but its mapping still has the values.
    assert not list(scratch.iterdir())
    _assert_same(checkpoint.tensors, state)


def test_damaged_partitions_are_noticed_when_values_are_read(tmp_path, golden_state):
    pytest.importorskip("deepspeed")
    folder = write_zero(tmp_path / "iter", golden_state("iter_5_pretrain.pth"), stage=3)
    path = sorted(folder.glob("*_optim_states.pt"))[1]
    place = max(places(path, "/data/"), key=len)
    flip(path, place[99])
    tensors = read_checkpoint(folder).tensors
    for tensor in tensors.values():  # the reader's partitions may be in any file
        with pytest.raises(ConversionError, match=r"_optim_states\.pt is damaged: its entry .* checksum"):
            tensor.load()


def test_empty_partitions_are_joined(tmp_path, golden_state):
    pytest.importorskip("deepspeed")
    state = golden_state("iter_5_pretrain.pth")
    folder = write_zero(tmp_path / "iter", {**state, "empty": torch.zeros(0, 3)}, stage=2)
    _assert_same(read_checkpoint(folder).tensors, {**state, "empty": torch.zeros(0, 3)})


@pytest.mark.parametrize("value", [3, [torch.zeros(1)]])
def test_deepspeed_reader_that_returns_other_values_is_refused(tmp_path, golden_state, monkeypatch, value):
    reader = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    folder = write_zero(tmp_path / "iter", golden_state("iter_5_pretrain.pth"), stage=2)
    monkeypatch.setattr(reader, "get_fp32_state_dict_from_zero_checkpoint", lambda *given, **options: {"a": value})
    with pytest.raises(ConversionError, match="must hold names and tensors, got 'a'"):
        read_checkpoint(folder)
    monkeypatch.setattr(
        reader, "get_fp32_state_dict_from_zero_checkpoint", lambda *given, **options: {3: torch.ones(1)}
    )
    with pytest.raises(ConversionError, match="must hold names and tensors, got 3"):
        read_checkpoint(folder)


def test_reader_of_deepspeed_is_quiet_and_left_as_it_was(tmp_path, golden_state, capfd):
    reader = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    folder = write_zero(tmp_path / "iter", golden_state("iter_5_pretrain.pth"), stage=2)
    capfd.readouterr()
    read_checkpoint(folder)
    assert reader.torch is torch and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"is not a DeepSpeed checkpoint: expected .* It holds \[\]"),
        ({"latest": "step"}, r"names .*step, which holds no \*_model_states\.pt"),
        ({"latest": ""}, "must name a folder next to it, got ''"),
        ({"latest": ".."}, "must name a folder next to it"),
        ({"latest": "a/b"}, "must name a folder next to it"),
        ({"latest": "a\x07b"}, "must name a folder next to it"),
    ],
)
def test_folders_without_the_files_of_deepspeed(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConversionError, match=said):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("meta", "said"),
    [("text", "got a str"), ([], "got a list"), ({3: 4}, "got a dict with other keys")],
)
def test_meta_of_another_kind_is_refused(tmp_path, meta, said):
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": meta}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=f"`meta` of .* must be a dict with text for keys, {said}"):
        read_checkpoint(tmp_path / "a.pth")


def test_files_without_meta_or_config_text(tmp_path):
    for content in ({"a": torch.ones(1)}, {"state_dict": {"a": torch.ones(1)}, "meta": {"cfg": 3}}):
        torch.save(content, tmp_path / "a.pth")
        checkpoint = read_checkpoint(tmp_path / "a.pth")
        assert list(checkpoint.tensors) == ["a"] and checkpoint.config_text == ""
        assert checkpoint.files == [tmp_path / "a.pth"] and checkpoint.path == tmp_path / "a.pth"
