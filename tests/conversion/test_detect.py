"""Detection of source formats, and the errors for files of other kinds."""

import json
import os

import pytest
import torch

from mgllava.conversion import ConversionError, convert_checkpoint, export_original
from mgllava.conversion.detect import source_formats
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
