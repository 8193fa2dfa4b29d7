import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mgllava.conversion import ConversionError
from mgllava.model_files.shard_writer import check_disk_space, plan_shards, write_shard
from mgllava.model_files.staging import StagingFolder
from mgllava.model_files.tensor_files import LazyTensor, from_tensor

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "scalar": torch.tensor(2.5),
    "brain": torch.randn(7).bfloat16(),
    "flag": torch.tensor([True, False, True]),
    "index": torch.arange(5),
    "strided": torch.randn(4, 6).T,
    "empty": torch.empty(0, 3),
    "full": torch.randn(8, 8),
    "double": torch.randn(3).double(),
    **{str(dtype): torch.arange(3).to(dtype) for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8)},
}


def _lazy():
    return {name: from_tensor(value, f"test:{name}") for name, value in TENSORS.items()}


@pytest.mark.parametrize(("size", "files"), [("1GB", 1), (100, 4)])
def test_safetensors_reads_the_files(tmp_path, size, files):
    plan = plan_shards(_lazy(), size)
    assert len(plan.shards) == files
    loaded = {}
    for shard in plan.shards:
        write_shard(shard, tmp_path, lambda count: None)
        assert (tmp_path / shard.filename).stat().st_size == shard.size
        loaded.update(load_file(tmp_path / shard.filename))
    assert loaded.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)
    assert (plan.index is None) == (files == 1)
    if plan.index:
        assert plan.index["weight_map"].keys() == TENSORS.keys()
        assert plan.index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())


def test_at_most_two_tensors_are_in_memory(tmp_path):
    alive, most = set(), 0

    class Tracked(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def load():
        nonlocal most
        value = torch.ones(4).as_subclass(Tracked)
        alive.add(id(value))
        most = max(most, len(alive))
        return value

    tensors = {f"t{i}": LazyTensor((4,), torch.float32, "test", load) for i in range(6)}
    write_shard(plan_shards(tensors, "1GB").shards[0], tmp_path, lambda count: None)
    # The next tensor is loaded before the last one is freed.
    assert most <= 2


def test_tensor_of_another_shape_than_planned_is_an_error(tmp_path):
    planned = LazyTensor((2,), torch.float32, "test", lambda: torch.zeros(3))
    with pytest.raises(ConversionError, match="expected"):
        write_shard(plan_shards({"t": planned}, "1GB").shards[0], tmp_path, lambda count: None)
    assert not (tmp_path / "model.safetensors").exists()


def test_values_are_aligned_to_their_dtype(tmp_path):
    (shard,) = plan_shards(_lazy(), "1GB").shards
    write_shard(shard, tmp_path, lambda count: None)
    content = (tmp_path / shard.filename).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % TENSORS[name].dtype.itemsize == 0


@pytest.mark.parametrize(
    ("size", "files"),
    [
        *((size, 1) for size in ("1KB", "1kb", " 1 MB ", "1.5GB", "1TB", "0.5Gb", "0.000000001TB", 1000)),
        *((size, 2) for size in ("0.001KB", "0.000001MB", "0.000000001GB", "0.000000000001TB", 1)),
    ],
)
def test_shard_sizes_are_those_of_transformers(size, files):
    tensors = {name: from_tensor(torch.zeros(100), name) for name in "ab"}
    assert len(plan_shards(tensors, size).shards) == files


@pytest.mark.parametrize(
    "size",
    ["much", "", "1", "1B", "1PB", "KB", "-1GB", "1e3KB", "0GB", "0.0009KB", "0.0000009MB", 0, -1, True, 1.5, None],
)
def test_impossible_shard_sizes_are_refused(size):
    with pytest.raises(ConversionError, match=f"`max_shard_size` must be like 5GB or 500MB, got {size}"):
        plan_shards(_lazy(), size)


@pytest.mark.parametrize(("free", "is_enough"), [(99, False), (100, True)])
def test_disk_space(tmp_path, monkeypatch, free, is_enough):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    if is_enough:
        check_disk_space(tmp_path, 100)
    else:
        with pytest.raises(ConversionError, match="Not enough disk space"):
            check_disk_space(tmp_path, 100)


def test_casts_are_in_the_origin_of_a_value():
    tensor = from_tensor(torch.tensor([1.5, 2.5]), "a")
    half = tensor.to(torch.float16)
    assert (half.dtype, half.nbytes, tensor.nbytes) == (torch.float16, 4, 8) and half.origin != tensor.origin
    assert half.load().dtype == torch.float16 and tensor.to(torch.float32) is tensor
    number = from_tensor(torch.tensor([1]), "b")
    assert number.to(torch.float16) is number


def test_dtypes_that_transformers_does_not_load_are_refused():
    with pytest.raises(ConversionError, match="complex64"):
        plan_shards({"t": from_tensor(torch.zeros(1, dtype=torch.complex64), "test")}, "1GB")


def test_digests_of_different_plans_differ():
    shard = plan_shards(_lazy(), "1GB").shards[0]
    other_origin = {name: from_tensor(value, f"other:{name}") for name, value in TENSORS.items()}
    digests = {
        shard.digest({"a": "1"}),
        shard.digest({"a": "2"}),
        plan_shards(other_origin, "1GB").shards[0].digest({"a": "1"}),
    }
    assert len(digests) == 3
    assert shard.digest({"a": "1"}) == plan_shards(_lazy(), "1GB").shards[0].digest({"a": "1"})


def test_staging_keeps_only_finished_shards_of_the_same_plan(tmp_path):
    staging = StagingFolder(tmp_path / "out", False, "mgllava")
    shards = plan_shards(_lazy(), 100).shards
    digests = {shard.filename: shard.digest({}) for shard in shards}
    assert staging.keep_finished(digests, shards) == set()
    write_shard(shards[0], staging.path, lambda count: None)
    write_shard(shards[1], staging.path, lambda count: None)
    (staging.path / shards[1].filename).write_bytes(b"cut")
    (staging.path / ".model-00003-of-00003.safetensors.0123abcd.partial").write_bytes(b"half")
    assert staging.keep_finished(digests, shards) == {shards[0].filename}
    assert {path.name for path in staging.path.iterdir()} == {shards[0].filename, "conversion_progress.json"}
    changed = {**digests, shards[0].filename: "another plan"}
    assert staging.keep_finished(changed, shards) == set()


def test_existing_outputs(tmp_path):
    output = tmp_path / "out"
    StagingFolder(output, False, "mgllava")
    output.mkdir()
    StagingFolder(output, False, "mgllava")
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(ConversionError, match="`overwrite=True` to replace it"):
        StagingFolder(output, False, "mgllava")
    with pytest.raises(ConversionError, match="is not a mgllava model folder"):
        StagingFolder(output, True, "mgllava")
    (output / "config.json").write_text(json.dumps({"model_type": "mgllava"}))
    StagingFolder(output, True, "mgllava")
