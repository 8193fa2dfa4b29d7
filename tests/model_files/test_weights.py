"""Weights of model folders: which files are read, and what their index may say."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mgllava.conversion import ConversionError
from mgllava.model_files.tensor_files import open_safetensors, open_weights, sha256


def _save(path, **weights):
    tensors = {name: torch.tensor([float(value)]) for name, value in weights.items()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def _index(path, **weight_map):
    path.write_text(json.dumps({"weight_map": weight_map}))


def _read(folder):
    tensors, files = open_weights(folder)
    return {name: tensor.load().item() for name, tensor in tensors.items()}, [path.name for path in files]


def test_files_are_preferred_as_transformers_does(tmp_path):
    with pytest.raises(ConversionError, match=r"has no weights: expected model\.safetensors .* it holds \."):
        open_weights(tmp_path)
    _save(tmp_path / "pytorch_model-00001-of-00001.bin", a=4)
    _index(tmp_path / "pytorch_model.bin.index.json", a="pytorch_model-00001-of-00001.bin")
    assert _read(tmp_path) == ({"a": 4}, ["pytorch_model-00001-of-00001.bin"])
    _save(tmp_path / "pytorch_model.bin", a=3)
    assert _read(tmp_path) == ({"a": 3}, ["pytorch_model.bin"])
    _save(tmp_path / "model-00001-of-00002.safetensors", a=2)
    _save(tmp_path / "model-00002-of-00002.safetensors", b=2)
    names = {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    _index(tmp_path / "model.safetensors.index.json", **names)
    assert _read(tmp_path) == ({"a": 2, "b": 2}, sorted(names.values()))
    _save(tmp_path / "model.safetensors", a=1)
    assert _read(tmp_path) == ({"a": 1}, ["model.safetensors"])


@pytest.mark.parametrize(("number", "more"), [(10, "a8, a9."), (11, "a7, a8 and 1 more.")])
def test_tensors_that_the_shards_lack_are_named(tmp_path, number, more):
    _save(tmp_path / "model-00001-of-00001.safetensors", x=1)
    names = {f"a{index}": "model-00001-of-00001.safetensors" for index in range(number)}
    _index(tmp_path / "model.safetensors.index.json", x="model-00001-of-00001.safetensors", **names)
    with pytest.raises(ConversionError) as error:
        open_weights(tmp_path)
    assert f"names {number} tensors that its shards lack: a0, " in str(error.value)
    assert str(error.value).endswith(more)


def test_files_that_are_not_safetensors_are_named(tmp_path):
    for content in (b"", b"{}", b"\xff" * 100, (10).to_bytes(8, "little") + b'{"a": 3}  '):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read as a safetensors file"):
            open_safetensors(tmp_path / "model.safetensors")


def test_digest_tells_each_byte(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (5 << 20))
    counted = []
    # By `sha256sum`.
    assert sha256(tmp_path / "a", counted.append) == "dba67a476fa78973aabb087f214a1010f3bebca053674e0af50dfe5a582112be"
    assert sum(counted) == 5 << 20
