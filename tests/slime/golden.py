"""Access to the original's numbers under `tests/golden_slime` (see the README there)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).parents[1] / "golden_slime"

# The original's placeholder, and the number of words of its tokenizer.
REFERENCE_IMAGE_ID, VOCAB_SIZE = -200, 300
NUM_GLOBAL, NUM_LOCAL = 576, 16
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@cache
def load_json(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def cases():
    """All cases by name; the further ones have their files under `more`."""
    found = {case["name"]: {**case, "folder": GOLDEN} for case in load_json("cases")["cases"]}
    more = {case["name"]: {**case, "folder": GOLDEN / "more"} for case in load_json("more/cases")["cases"]}
    return found | more


def tensors(case):
    return load_file(case["folder"] / case["tensors"])


def image_path(case, name=None):
    path = case["folder"] / (name or case["image"])
    return path if path.is_file() else GOLDEN / (name or case["image"])


def normalized_views(path):
    """The stored views of an image, which are one above the other, as `pixel_values`."""
    views = torch.from_numpy(np.array(Image.open(path))).unflatten(0, (-1, 336)).permute(0, 3, 1, 2)
    return (views.float() / 255 - MEAN) / STD


def num_placeholders(rows, columns):
    return NUM_GLOBAL + (1 + rows * columns * NUM_LOCAL if rows else 0)


def expand(ids, lengths, image_id):
    """Replace the original's placeholder by those of each image."""
    lengths, expanded = iter(lengths), []
    for token in ids:
        expanded += [image_id] * next(lengths) if token == REFERENCE_IMAGE_ID else [token]
    return expanded


@cache
def load_checkpoint():
    """The weights of the checkpoint under our names, renamed here a second time, in float32."""
    files = sorted((GOLDEN / "checkpoint").glob("*.safetensors"))
    theirs = {name: value.float() for file in files for name, value in load_file(file).items()}
    ours = weights_of_adapter(theirs, "model.mm_projector.attn.", "model.multi_modal_projector.query_adapter.")
    ours |= weights_of_adapter(theirs, "model.sampler.post_qformer.", "model.local_compressor.")
    others = {
        "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
        "model.mm_projector.projection.0.": "model.multi_modal_projector.linear_1.",
        "model.mm_projector.projection.2.": "model.multi_modal_projector.linear_2.",
        "model.mm_projector.w_gate": "model.multi_modal_projector.gate",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.layers.": "model.language_model.layers.",
        "model.norm.": "model.language_model.norm.",
        "lm_head.": "lm_head.",
    }
    for name, value in theirs.items():
        for prefix, new in others.items():
            if name.startswith(prefix):
                is_table = name.startswith(("model.embed_tokens.", "lm_head."))
                value = torch.cat([value, value.new_zeros(4, value.shape[1])]) if is_table else value
                ours[new + name.removeprefix(prefix)] = value
    return ours


def weights_of_adapter(weights, prefix, new_prefix=""):
    """Weights of a query adapter of the original under our names."""
    names = {
        "query": "queries",
        "pos_embed": "positions",
        "attn.out_proj": "out_proj",
        "ln_q": "query_norm",
        "ln_kv": "context_norm",
        "ln_post": "output_norm",
    }
    found = {}
    for name, value in weights.items():
        short = name.removeprefix(prefix)
        if not name.startswith(prefix):
            continue
        if short.startswith("attn.in_proj_"):
            kind = short.removeprefix("attn.in_proj_")
            parts = zip("qkv", value.float().chunk(3), strict=True)
            found |= {f"{new_prefix}{one}_proj.{kind}": part for one, part in parts}
            continue
        theirs = next(one for one in names if short.startswith(one) and short[len(one) :][:1] in ("", "."))
        found[new_prefix + names[theirs] + short.removeprefix(theirs)] = value.float()
    return found
