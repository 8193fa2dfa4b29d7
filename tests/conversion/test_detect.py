"""What is recognized as which checkpoint, and what is said about everything else."""

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


def test_formats_belong_to_their_families():
    for name, family in FAMILIES.items():
        assert family.source_formats
        for source_format in source_formats():
            assert isinstance(source_format, SourceFormat) and source_format.model_type in FAMILIES
        assert any(source_format.model_type == name for source_format in source_formats())


@pytest.mark.parametrize(
    ("name", "said"),
    [("iter_10.pth", "an XTuner checkpoint of MG-LLaVA"), ("iter_8_lora.pth", "an XTuner checkpoint of MG-LLaVA")],
)
def test_needed_arguments_are_named_before_anything_else_is_read(tmp_path, golden, sources, name, said):
    message = _failure(tmp_path, golden / "xtuner" / name, **{**sources, "llm": None, "vision_tower": None})
    assert said in message and "needs `llm`, `vision_tower`." in message


def test_ram_plus_checkpoint_is_sent_to_its_own_function(tmp_path, sources):
    message = _failure(tmp_path, SOURCES["checkpoint"], **sources)
    assert "is a RAM++ checkpoint, which `convert_ram_plus` converts" in message


@pytest.mark.parametrize("model_type", ["llava_llama", "llava", "llava_mistral"])
def test_llava_is_named_with_what_to_use_instead(tmp_path, sources, model_type):
    message = _failure(tmp_path, _model_folder(tmp_path / "model", model_type=model_type), **sources)
    assert f"is a LLaVA model (model type '{model_type}')" in message and "LlavaForConditionalGeneration" in message


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_model_folder_of_this_package_needs_no_conversion(tmp_path, sources, model_type):
    message = _failure(tmp_path, _model_folder(tmp_path / "model", model_type=model_type), **sources)
    assert "Load it with `from_pretrained`" in message


def test_other_folders_and_files_get_a_list_of_what_was_looked_for(tmp_path, sources):
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
def test_pipe_is_refused_and_not_waited_for(tmp_path, sources):
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


def test_way_back_is_that_of_the_family(tmp_path, converted, golden_state):
    written = export_original(converted, tmp_path / "back.pth")
    assert torch.load(written, weights_only=True)["state_dict"].keys() == golden_state("iter_10.pth").keys()
    for model in (_model_folder(tmp_path / "tagger", model_type="ram_plus"), tmp_path):
        with pytest.raises(ConversionError, match="`checkpoint` must be the folder of an MG-LLaVA or SliME model"):
            export_original(model, tmp_path / "other.pth")
