import pytest
import torch
from peft import get_peft_model
from rich.console import Console

from mgllava.training import TrainingError, check_trained, describe_trained, freeze_all_but, lora_config
from mgllava.training.trainable import trained_parameters
from tests.tiny import tiny_model

NEW_PARTS = ["fusion", "multi_modal_projector", "box_projector", "object_attention"]


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("patterns", [NEW_PARTS, ["fusion", "language_model.layers.1"], ["*norm*"]])
def test_what_is_named_is_trained(patterns):
    model = tiny_model()
    freeze_all_but(model, patterns)
    check_trained(model, patterns)
    counted = {name for name, trained, _, _ in trained_parameters(model) if trained}
    starts = (
        {"fusion", "multi_modal_projector", "box_projector"} if patterns is NEW_PARTS else {"fusion", "language_model"}
    )
    if "*norm*" in patterns:
        assert all("norm" in name for name in trained_names(model))
    else:
        assert counted == starts
    assert not any("layers.0" in name for name in trained_names(model)) or "*norm*" in patterns


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(TrainingError, match="Did you mean box_projector"):
        freeze_all_but(tiny_model(), ["fusion", "box_projektor"])
    # Variants without the module are fine, and so is one without parameters.
    freeze_all_but(tiny_model(fusion_type="none", object_merging="none"), [*NEW_PARTS, "language_model"])


def test_what_is_trained_against_the_declaration_is_found():
    model = tiny_model()
    freeze_all_but(model, NEW_PARTS)
    model.model.fusion.gate[0].weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(
        TrainingError, match=r"2 parameters.*fusion\.gate\.0\.weight \(frozen\).*lm_head.weight \(trained"
    ):
        check_trained(model, NEW_PARTS)


@pytest.mark.parametrize(
    ("llm", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ],
)
def test_adapters_sit_on_every_linear_layer_of_the_language_model(llm, layers):
    model = tiny_model(llm)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model" in name
    }
    assert {name.split(".")[-1] for name in linear} == layers
    adapted = get_peft_model(model, lora_config(model, r=2))
    check_trained(adapted, NEW_PARTS, lora=True)
    with_adapter = {
        name.split(".lora_A")[0].removeprefix("base_model.model.")
        for name in trained_names(adapted)
        if "lora_A" in name
    }
    assert with_adapter == linear
    assert {name.split(".")[3] for name in trained_names(adapted) if "lora_" not in name} == set(NEW_PARTS[:3])


def test_the_table_counts():
    model = tiny_model()
    freeze_all_but(model, NEW_PARTS)
    console = Console(record=True, width=100)
    console.print(describe_trained(model))
    text = console.export_text()
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}" in text
