"""Conversions with language models and image sizes that the golden set does not have."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, CLIPVisionConfig, CLIPVisionModel

from mgllava.conversion import convert_checkpoint
from tests.golden_cases import GOLDEN
from tests.tiny import tiny_config

LANGUAGE_MODELS = [("llama", "llama3"), ("phi3", "phi3"), ("qwen2", "yi"), ("qwen3", "yi"), ("mistral", "vicuna")]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("llm", "template"), LANGUAGE_MODELS)
def test_any_language_model_converts_and_keeps_its_logits(tmp_path, llm, template, tied):
    text_config = tiny_config(llm, text_config={"vocab_size": 420, "tie_word_embeddings": tied}).text_config
    bare = AutoModelForCausalLM.from_config(text_config).eval()
    shutil.copytree(GOLDEN / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    bare.save_pretrained(tmp_path / "llm")
    golden = torch.load(GOLDEN / "xtuner" / "iter_5_pretrain.pth", weights_only=True)
    state = {f"llm.{name}": value for name, value in bare.state_dict().items()}
    for name, value in golden["state_dict"].items():
        is_projector = name.startswith(("projector", "bbox_projector"))
        keeps_input = name.endswith("0.weight")
        if is_projector:  # 64 wide in the golden set, 32 here
            value = value[:32] if keeps_input or value.ndim == 1 else value[:32, :32]
        state[name] = value
    torch.save({"meta": golden["meta"], "state_dict": state}, tmp_path / "iter_1.pth")

    repository = convert_checkpoint(
        tmp_path / "iter_1.pth", tmp_path / "llm", GOLDEN / "clip", GOLDEN / "convnext", template, tmp_path / "model"
    )
    model, info = AutoModel.from_pretrained(repository, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, 5, 300, 419, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :420], bare(ids).logits)


def test_sizes_follow_the_config_text_and_the_towers(tmp_path):
    """384 and 168 px, which both give a grid of 12x12, as in the small model."""
    clip = json.loads((GOLDEN / "clip" / "config.json").read_text())["vision_config"]
    CLIPVisionModel(CLIPVisionConfig(**{**clip, "image_size": 168})).save_pretrained(tmp_path / "clip")
    golden = torch.load(GOLDEN / "xtuner" / "iter_10.pth", weights_only=True)
    golden["meta"]["cfg"] = "image_size_aux = 384\n"
    torch.save(golden, tmp_path / "iter_10.pth")
    repository = convert_checkpoint(
        tmp_path / "iter_10.pth",
        GOLDEN / "llm",
        tmp_path / "clip",
        GOLDEN / "convnext",
        "vicuna",
        tmp_path / "model",
    )
    model, processor = AutoModel.from_pretrained(repository), AutoProcessor.from_pretrained(repository)
    image = Image.open(GOLDEN / "images" / "landscape.png")
    inputs = processor(image, "USER: <image>\nHi ASSISTANT:", boxes=[[[0, 0, 320, 213]]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 384, 384)
    assert inputs["boxes"].tolist() == [[[0, 64, 384, 319]]]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 12 * 12 + 1
    assert model(**inputs).logits.isfinite().all()
