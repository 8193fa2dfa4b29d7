"""Detection of source formats, and the errors for files of other kinds."""

import json
import os

import pytest
import torch

from mgllava.conversion import ConversionError, convert_checkpoint, export_original
from mgllava.conversion.detect import source_formats, tensor_names
from mgllava.conversion.source_format import SourceFormat
from mgllava.families import FAMILIES
from tests.ram_plus.golden import SOURCES


def _failure(tmp_path, checkpoint, **options):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(checkpoint, **options, output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(error.value)


def _model_folder(folder, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_source_formats_belong_to_families():
    assert all(isinstance(source_format, SourceFormat) for source_format in source_formats())
    assert {source_format.model_type for source_format in source_formats()} == set(FAMILIES)


def test_missing_arguments_are_named_before_anything_else_is_read(tmp_path, golden, sources):
    message = _failure(
        tmp_path, golden / "xtuner" / "iter_8_lora.pth", **{**sources, "llm": None, "vision_tower": None}
    )
    assert "an XTuner checkpoint of MG-LLaVA" in message and "needs `llm`, `vision_tower`." in message


def test_error_for_a_ram_plus_checkpoint_names_its_function(tmp_path, sources):
    message = _failure(tmp_path, SOURCES["checkpoint"], **sources)
    assert "is a RAM++ checkpoint, which `convert_ram_plus` converts" in message


@pytest.mark.parametrize("model_type", ["llava_llama", "llava", "llava_mistral"])
def test_error_for_a_llava_model_names_the_class_that_loads_it(tmp_path, sources, model_type):
    message = _failure(tmp_path, _model_folder(tmp_path / "model", model_type=model_type), **sources)
    assert f"is a LLaVA model (model type '{model_type}')" in message and "LlavaForConditionalGeneration" in message


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_model_folder_of_this_package_needs_no_conversion(tmp_path, sources, model_type):
    message = _failure(tmp_path, _model_folder(tmp_path / "model", model_type=model_type), **sources)
    assert "Load it with `from_pretrained`" in message


def test_error_for_unknown_files_lists_what_was_looked_for(tmp_path, sources):
    (tmp_path / "notes.txt").write_text("text")
    torch.save({"linear.weight": torch.ones(2)}, tmp_path / "other.bin")
    (tmp_path / "empty").mkdir()
    cases = {
        _model_folder(tmp_path / "bert", model_type="bert"): "holds config.json, with model type 'bert'",
        tmp_path / "notes.txt": "not a file of `torch.save`",
        tmp_path / "other.bin": "it holds linear.weight",
        tmp_path / "empty": "the folder holds nothing",
    }
    for path, said in cases.items():
        message = _failure(tmp_path, path, **sources)
        assert said in message and all(one.looked_for in message for one in source_formats())


@pytest.mark.parametrize(
    ("number", "file_said", "folder_said"),
    [
        (5, "it holds a0, a1, a2, a3, a4. ", "holds a0, a1, a2, a3, a4. "),
        (6, "it holds a0, a1, a2, a3, a4 and 1 more. ", "a4, a5. "),
        (10, "a4 and 5 more. ", "a8, a9. "),
        (11, "a4 and 6 more. ", "a7, a8 and more. "),
    ],
)
def test_long_lists_of_unknown_contents_are_cut(tmp_path, sources, number, file_said, folder_said):
    names = [f"a{index}" for index in range(number)]
    torch.save(dict.fromkeys(names, torch.ones(1)), tmp_path / "other.bin")
    assert file_said in _failure(tmp_path, tmp_path / "other.bin", **sources)
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).touch()
    assert folder_said in _failure(tmp_path, tmp_path / "folder", **sources)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".other"])
@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_names_in_a_torch_file(tmp_path, suffix, key):
    """Of any name, if it starts like one."""
    state = {"a.weight": torch.ones(1), 3: 4, "b": "text"}
    torch.save({key: state, "c": 1} if key else state, tmp_path / f"a{suffix}")
    assert tensor_names(tmp_path / f"a{suffix}") == ["a.weight", "b"]
    torch.save([1], tmp_path / f"a{suffix}", _use_new_zipfile_serialization=False)
    assert tensor_names(tmp_path / f"a{suffix}") == []
    (tmp_path / f"a{suffix}").write_bytes(b"text")
    if suffix == ".other":
        assert tensor_names(tmp_path / "a.other") is None
    else:
        with pytest.raises(ConversionError, match="cannot be read as a torch file"):
            tensor_names(tmp_path / f"a{suffix}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipe_is_refused_without_waiting(tmp_path, sources):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "must be a file or a folder" in _failure(tmp_path, tmp_path / "pipe.pth", **sources)


def test_output_of_another_family_is_not_replaced(tmp_path, golden, sources):
    output = _model_folder(tmp_path / "out", model_type="ram_plus")
    with pytest.raises(ConversionError, match="is not a mgllava model folder, so `overwrite` does not replace it"):
        convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources, output=output, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["config.json"]


def test_output_must_be_given(golden, sources):
    with pytest.raises(ConversionError, match="`output` must be"):
        convert_checkpoint(golden / "xtuner" / "iter_10.pth", **sources)


def test_models_of_other_families_are_not_converted_to_the_original_layout(tmp_path):
    for model in (_model_folder(tmp_path / "tagger", model_type="ram_plus"), tmp_path):
        with pytest.raises(ConversionError, match="`checkpoint` must be the folder of an MG-LLaVA or SliME model"):
            export_original(model, tmp_path / "other.pth")
