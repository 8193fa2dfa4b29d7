"""The model that a recipe loads: its attention, bits and dtypes."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from mgllava.families import FAMILIES
from mgllava.training import TrainingError, load_recipe
from mgllava.training.recipe import ModelOptions
from mgllava.training.recipe_model import family_of_recipe, load_model
from mgllava.training.trainable import trained_parameters
from tests.training.conftest import words_model

PLAIN = {"bf16": False, "fp16": False, "deepspeed": None, "fsdp": None}


def load(folder, *changes, **arguments):
    recipe = load_recipe("stage_2_vicuna_7b.yaml", "model.dtype=bfloat16", *changes)
    return load_model(recipe, str(folder), SimpleNamespace(**{**PLAIN, **arguments}), FAMILIES["mgllava"])


@pytest.mark.parametrize(
    ("arguments", "in_float32"),
    [({}, False), ({"bf16": True}, True), ({"fp16": True}, True)]
    + [({"bf16": True, name: {"a": 1}}, False) for name in ("deepspeed", "fsdp")],
)
def test_what_is_trained_is_in_float32_where_nothing_else_keeps_a_copy(small_repository, arguments, in_float32):
    model = load(small_repository, "train=[fusion]", **arguments)
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32 if in_float32 else torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_the_family_is_that_of_the_model_and_must_be_that_of_the_recipe(small_repository, tmp_path):
    both = shutil.copytree(small_repository, tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    for options in (ModelOptions(), ModelOptions(parts={}), ModelOptions(family="mgllava")):
        assert family_of_recipe(options, str(both)) is FAMILIES["mgllava"]
    with pytest.raises(OSError, match="connect"):
        family_of_recipe(ModelOptions(), "no/such")
    (tmp_path / "config.json").write_text('{"model_type": "slime"}')
    for options in (ModelOptions(), ModelOptions(family="slime")):
        assert family_of_recipe(options, str(tmp_path)) is FAMILIES["slime"]
    for options in (ModelOptions(family="mgllava"), ModelOptions(parts={})):
        with pytest.raises(TrainingError, match=r"`model\.family` must be slime, .*got mgllava"):
            family_of_recipe(options, str(tmp_path))


def test_attention_is_that_of_the_recipe(small_repository):
    for name in ("eager", "sdpa"):
        assert load(small_repository, f"model.attn_implementation={name}").config._attn_implementation == name


def test_quantized_parameters_are_counted_in_full(small_repository):
    pytest.importorskip("bitsandbytes")
    model = load(small_repository, "lora.yaml", "model.bits=4", "lora.r=2")
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj.base_layer")}
    assert kinds == {"Linear4bit"}
    counts = {name: (trained, total) for name, trained, total, _ in trained_parameters(model)}
    trained, total = counts["language_model"]
    plain = sum(parameter.numel() for parameter in words_model().model.language_model.parameters())
    assert total == plain + trained and 0 < trained < plain
