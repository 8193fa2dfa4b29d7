import pytest
import torch

from mgllava.conversion import ConversionError
from mgllava.conversion.lora import merge_lora
from mgllava.conversion.xtuner.lora import lora_scaling, read_lora_settings, split_lora
from mgllava.model_files.tensor_files import from_tensor


def _lazy(*shape, dtype=torch.float32):
    return from_tensor(torch.randn(*shape).to(dtype), "test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_formula_in_float32(dtype):
    base, low_a, low_b = _lazy(6, 4, dtype=dtype), _lazy(2, 4, dtype=dtype), _lazy(6, 2, dtype=dtype)
    merged = merge_lora(base, low_a, low_b, 4.0)
    expected = base.load().double() + 4.0 * low_b.load().double() @ low_a.load().double()
    # Rounded once, later, to the dtype of the model.
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.load(), expected.float())
    assert not torch.equal(merged.load(), base.load())


@pytest.mark.parametrize(
    ("low_a", "low_b"),
    [((2, 5), (6, 2)), ((2, 4), (5, 2)), ((2, 4), (6, 3)), ((8,), (6, 2)), ((2, 4), (12,)), ((2, 4, 1), (6, 2))],
)
def test_factors_that_do_not_fit_are_refused(low_a, low_b):
    with pytest.raises(ConversionError, match=r"do not fit the base weight"):
        merge_lora(_lazy(6, 4), _lazy(*low_a), _lazy(*low_b), 1.0)


def test_packed_base_weights_keep_their_dtype_for_the_error_about_it():
    assert merge_lora(_lazy(6, 4, dtype=torch.int8), _lazy(2, 4), _lazy(6, 2), 1.0).dtype == torch.int8


def test_tensors_are_sorted_by_the_names_of_peft():
    prefix = "llm.base_model.model.model"
    state = {
        f"{prefix}.layers.0.mlp.up_proj.base_layer.weight": _lazy(2, 2),
        f"{prefix}.layers.0.mlp.up_proj.lora_A.default.weight": _lazy(1, 2),
        f"{prefix}.layers.0.mlp.up_proj.lora_B.default.weight": _lazy(2, 1),
        f"{prefix}.norm.weight": _lazy(2),
        "llm.base_model.model.lm_head.original_module.weight": _lazy(3, 2),
        "llm.base_model.model.lm_head.modules_to_save.default.weight": _lazy(3, 2),
    }
    parts = split_lora(state)
    assert parts.plain.keys() == {
        "llm.model.layers.0.mlp.up_proj.weight",
        "llm.model.norm.weight",
        "llm.lm_head.weight",
    }
    assert parts.factors["llm.model.layers.0.mlp.up_proj.weight"].keys() == {"A", "B"}
    assert parts.dropped.keys() == {"llm.base_model.model.lm_head.original_module.weight"}
    assert parts.has_base
    saved = state["llm.base_model.model.lm_head.modules_to_save.default.weight"]
    assert parts.plain["llm.lm_head.weight"] is saved


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("llm_lora = dict(type='peft.LoraConfig', r=8, lora_alpha=32, bias='none')", 32),
        ("model = dict(\n    llm_lora=dict(\n        lora_alpha=256,\n        r=512))", 256),
        ("llm_lora = dict(lora_alpha=16)\nvisual_encoder_lora = dict(lora_alpha=64)", 16),
        ("a = dict(lora_alpha=16)\nb = dict(lora_alpha=64)", None),
        ("visual_encoder_lora = dict(r=64, lora_alpha=64)", None),
        ("model = dict(llm=dict(type='x'), visual_encoder_lora=dict(lora_alpha=64))", None),
        ("model = dict(visual_encoder_lora=dict(lora_alpha=64), llm_lora=dict(r=8))", None),
        ("model = dict(llm_lora=dict(\n  lora_alpha=1e2))", 100),
        ("model = {'llm_lora': {'target': dict(a=')'), 'lora_alpha': 12.5}}", 12.5),
        ("alpha = 24\nllm_lora = dict(lora_alpha=alpha)", 24),
        ("llm_lora = dict(lora_alpha=float('nan'))", None),
        ("llm_lora = dict(lora_alpha=-32)", None),
        ("llm_lora = dict(lora_alpha=True)", None),
        ("llm_lora = dict(lora_alpha=16)\nother = dict(llm_lora=dict(lora_alpha=64))", None),
        ("# lora_alpha=8\nnote = 'lora_alpha=9'", None),
        ("llm_lora = dict(lora_alpha=", None),
        ("(" * 10_000, None),
        ("image_size_aux = 768", None),
        ("wrap(dict(llm_lora=dict(lora_alpha=16)))", 16),
        ("models = [dict(llm_lora=dict(lora_alpha=16)), 3]", 16),
        ("{3: dict(lora_alpha=16), **more}", 16),
        ("a, b = 3, 4\nllm_lora = dict(lora_alpha=16, **more)", 16),
        ("alpha = other\nllm_lora = dict(lora_alpha=alpha)", None),
        ("llm_lora = dict(lora_alpha=16)\nllm_lora_2 = dict(lora_alpha='16')", None),
        ("llm_lora = dict(lora_alpha=16)\nllm_lora_2 = dict(lora_alpha=16.0)", 16),
        ("__import__('os').abort()", None),
    ],
)
def test_alpha_is_read_from_the_config_text(text, alpha):
    assert read_lora_settings(text).alpha == alpha


def test_scaling():
    text = "lora_alpha=32"
    assert lora_scaling(None, 8, text) == 4
    assert lora_scaling(8.0, 8, text) == 1
    assert lora_scaling(None, 16, text + ", use_rslora=True") == 8
    with pytest.raises(ConversionError, match="Pass `lora_alpha`"):
        lora_scaling(None, 8, "")
    assert lora_scaling(8.0, 16, "no Python") == 0.5
    with pytest.raises(ConversionError, match="rank 0"):
        lora_scaling(8.0, 0, text)
    assert lora_scaling(None, 16, "llm_lora = dict(lora_alpha=32)\nvisual_encoder_lora = dict(use_rslora=True)") == 2


@pytest.mark.parametrize(
    ("pattern", "is_filled"),
    [
        ("{}", False),
        ("dict()", False),
        ("None", False),
        ("dict(q_proj=3)", True),
        ("dict([('q_proj', 3)])", True),
        ("{'q_proj': 3}", True),
        ("{'q_proj': other}", True),
        ("{**other}", True),
        ("other", True),
    ],
)
def test_alpha_of_single_modules_is_refused(pattern, is_filled):
    """Also where the text must be run to know it."""
    text = f"llm_lora = dict(lora_alpha=32, alpha_pattern={pattern})"
    if is_filled:
        with pytest.raises(ConversionError, match="`alpha_pattern`"):
            lora_scaling(None, 8, text)
    else:
        assert lora_scaling(None, 8, text) == 4


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0, -1.0, True])
def test_alpha_that_is_not_a_positive_number_is_refused(alpha):
    with pytest.raises(ConversionError, match="`lora_alpha` must be a positive number"):
        lora_scaling(alpha, 8, "llm_lora = dict(lora_alpha=32)")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("llm.model.norm.weight", "llm.base_model.model.model.norm.weight"),
        ("llm.base_model.model.q_proj.weight", "llm.base_model.model.q_proj.base_layer.weight"),
        ("llm.base_model.model.lm_head.weight", "llm.base_model.model.lm_head.modules_to_save.default.weight"),
    ],
)
def test_two_names_for_one_tensor_are_refused(first, second):
    for names in ((first, second), (second, first)):
        with pytest.raises(ConversionError, match=f"{names[0]} and {names[1]}"):
            split_lora({name: _lazy(2, 2) for name in names})
