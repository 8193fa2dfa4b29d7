import pytest
import torch
from peft import get_peft_model
from rich.console import Console

from mgllava.training import TrainingError, check_trained, describe_trained, freeze_all_but, lora_config
from mgllava.training.trainable import matching_pattern, part_of, short_name, trained_parameters
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


WRAPPED = {
    "model.fusion.gate.0.weight": "fusion.gate.0.weight",
    "module.model.fusion.gate.0.weight": "fusion.gate.0.weight",
    "_orig_mod.module.model.fusion.gate.0.weight": "fusion.gate.0.weight",
    "base_model.model.model.fusion.modules_to_save.default.gate.0.weight": "fusion.gate.0.weight",
    "lm_head.weight": "lm_head.weight",
    "base_model.model.lm_head.modules_to_save.default.weight": "lm_head.weight",
    "base_model.model.model.language_model.layers.1.q_proj.lora_A.default.weight": (
        "language_model.layers.1.q_proj.lora_A.weight"
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_parameters_are_known_by_the_same_names_in_wrapped_models(name):
    short = WRAPPED[name]
    assert short_name(name) == short and part_of(name) == short.partition(".")[0]
    assert matching_pattern(name, ["vision_tower", part_of(name), "*"]) == part_of(name)
    assert matching_pattern(name, [short.rpartition(".")[0]]) and matching_pattern(name, [short])
    assert matching_pattern(name, ["fus", "lm", "language", "weight"]) is None


def test_frozen_copies_and_weights_under_adapters_may_not_be_trained():
    model = get_peft_model(tiny_model(), lora_config(r=2))
    check_trained(model, NEW_PARTS, lora=True)
    for part in ("original_module", "q_proj.base_layer", "lm_head"):
        (name, parameter), *_ = [entry for entry in model.named_parameters() if part in entry[0]]
        parameter.requires_grad_(True)
        with pytest.raises(TrainingError, match=rf"^1 parameters differ .*{name} \(trained\)"):
            check_trained(model, [*NEW_PARTS, "language_model", "lm_head"], lora=True)
        parameter.requires_grad_(False)
    model.requires_grad_(False)
    with pytest.raises(TrainingError) as caught:
        check_trained(model, NEW_PARTS, lora=True)
    assert str(caught.value).count("(frozen)") == 5


def test_adapters_without_a_model_are_those_of_mgllava():
    config = lora_config(lora_alpha=5)
    assert set(config.modules_to_save) == set(NEW_PARTS)
    assert config.task_type == "CAUSAL_LM" and config.lora_alpha == 5


def test_the_table_counts():
    model = tiny_model()
    freeze_all_but(model, NEW_PARTS)
    console = Console(record=True, width=100)
    console.print(describe_trained(model))
    text = console.export_text()
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "float32" in line]
    sizes = {
        name: f"{sum(p.numel() for p in getattr(model.model, name).parameters()):,}"
        for name in ("fusion", "vision_tower")
    }
    assert ["fusion", "float32", sizes["fusion"], sizes["fusion"]] in rows
    assert ["vision_tower", "float32", "-", sizes["vision_tower"]] in rows
