"""The parts that are written from the shipped model equal its parts, and can be bundled again."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from mgllava import build_from_parts
from mgllava.conversion.build import build_slime
from small_world.bundle import LANGUAGE_MODEL, bundle, write_language_model
from small_world.demo import MODEL, SLIME
from small_world.parts import Part
from small_world.unbundle import unbundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    unbundle(MODEL, folder)
    return folder


def test_a_model_built_from_the_parts_has_the_towers_of_the_shipped_one(parts):
    shipped = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    again = build_from_parts(
        parts / "language-model",
        parts / "vision-tower",
        parts / "high-res-tower",
        high_res_image_size=shipped.config.high_res_vision_config.image_size,
        dtype=torch.float32,
    )
    for name in ("vision_tower", "high_res_vision_tower"):
        expected, got = (getattr(model.model, name).state_dict() for model in (shipped, again))
        assert expected.keys() == got.keys()
        assert all(torch.equal(value, got[key]) for key, value in expected.items())
    # The language model has the same shapes, but not the weights that stage 2 has tuned.
    expected, got = (model.model.language_model.state_dict() for model in (shipped, again))
    assert {key: value.shape for key, value in expected.items()} == {key: value.shape for key, value in got.items()}
    assert not torch.equal(expected["norm.weight"], got["norm.weight"])


def test_bundling_the_parts_again_gives_the_shipped_files(parts, tmp_path):
    bundle(MODEL, parts / "tagger", parts / "detector", tmp_path / "model")
    write_language_model(parts / "language-model", tmp_path / "language_model")
    for shipped, again in ((MODEL, tmp_path / "model"), (LANGUAGE_MODEL, tmp_path / "language_model")):
        files = {
            path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file() and path.name != "README.md"
        }
        assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == files
        for file in files:
            if file.suffix == ".safetensors":
                expected, got = load_file(shipped / file), load_file(again / file)
                assert expected.keys() == got.keys()
                for key, value in expected.items():
                    # Prompt embeddings are computed again.
                    tolerance = 1e-5 if file.stem == "prompt_embeds" else 0
                    torch.testing.assert_close(got[key], value, rtol=0, atol=tolerance)


def test_parts_of_the_small_slime_are_those_of_the_model(tmp_path):
    unbundle(SLIME, tmp_path)
    shipped = AutoModel.from_pretrained(SLIME, dtype=torch.float32)
    parts = {"llm": tmp_path / "language-model", "vision_tower": tmp_path / "tile-tower"}
    again, _ = build_slime(**parts, prompt_template="v1", dtype=torch.float32)
    vocab_size = shipped.config.unpadded_vocab_size
    expected, got = (model.state_dict() for model in (shipped, again))
    for name, value in expected.items():
        if name.startswith(("model.vision_tower", "model.language_model", "lm_head")):
            rows = vocab_size if "embed_tokens" in name or "lm_head" in name else None
            assert torch.equal(got[name][:rows], value[:rows]), name


def test_existing_parts_are_kept(parts, tmp_path):
    kept = tmp_path / "parts" / "tagger"
    kept.mkdir(parents=True)
    unbundle(MODEL, tmp_path / "parts")
    assert not list(kept.iterdir())
    assert {folder.name for folder in (tmp_path / "parts").iterdir()} == {folder.name for folder in parts.iterdir()}


def test_recipe_and_makefile_use_the_folder_names_of_the_parts():
    recipe, makefile = (
        (ROOT / name).read_text() for name in ("small_world/recipes/small_stage_1.yaml", "small_world/Makefile")
    )
    for text in (recipe.replace("small-world/parts/", "$(PARTS)/"), makefile):
        assert set(re.findall(r"\$\(PARTS\)/([\w-]+)", text)) <= {part.value for part in Part}
