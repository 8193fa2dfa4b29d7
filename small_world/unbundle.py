"""Write the parts of a shipped model, to train its stages without training the parts first.

    python -m small_world.unbundle small_world/model --output small-world/parts
    python -m small_world.unbundle small_world/slime_model --output small-slime/ablation/parts

They are written to the folders of `small_world.parts`, in float32 but rounded to float16. Of the small MG-LLaVA, these
are towers, tagger and detector; stage 2 tunes the language model, so the one that both stages start from is shipped
separately, in `small_world/language_model`. Of the small SliME, they are the vision tower, which training leaves as it
is, and its own language model, which can read. A model contains only a part of CLIP: the text model is missing, and
the last layer of the vision tower, whose output is not used, gets random weights.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

from mgllava import SlimeForConditionalGeneration

from .bundle import LANGUAGE_MODEL
from .parts import Part
from .parts.towers import save_high_res_tower


def unbundle(model: Path, output: Path, language_model: Path = LANGUAGE_MODEL) -> None:
    """Write the parts of a model that `small_world` made, except for those that exist in `output`."""
    loaded = AutoModel.from_pretrained(model, dtype=torch.float32)
    whole = loaded.model
    boxes = model / "box_detector"
    is_slime = isinstance(loaded, SlimeForConditionalGeneration)
    tower = Part.TILE_TOWER if is_slime else Part.VISION_TOWER
    parts: dict[Part, Callable[[Path], object]] = {
        Part.LANGUAGE_MODEL: lambda folder: shutil.copytree(language_model, folder),
        tower: lambda folder: _clip(whole.vision_tower).save_pretrained(folder),
    }
    if is_slime:
        parts[Part.LANGUAGE_MODEL] = lambda folder: _write_language_model(loaded, language_model, folder)
    else:
        parts |= {
            Part.HIGH_RES_TOWER: lambda folder: save_high_res_tower(whole.high_res_vision_tower, folder),
            Part.TAGGER: lambda folder: shutil.copytree(boxes / "tagger", folder),
            Part.DETECTOR: lambda folder: shutil.copytree(boxes / "detector", folder),
        }
    output.mkdir(parents=True, exist_ok=True)
    for part, write in parts.items():
        folder = output / part.value
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix=f".{part.value}-", dir=output) as partial:
                write(Path(partial) / part.value)
                (Path(partial) / part.value).rename(folder)


def _write_language_model(model: PreTrainedModel, untrained: Path, folder: Path) -> None:
    """Write the language model of a whole model without the placeholder; `untrained` has its sizes and tokenizer."""
    shutil.copytree(untrained, folder)
    alone = AutoModelForCausalLM.from_pretrained(untrained, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            whole_name = name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
            parameter.copy_(model.get_parameter(whole_name)[: len(parameter)])
    alone.save_pretrained(folder)


def _clip(tower: nn.Module) -> CLIPVisionModel:
    """Return a vision tower with the last layer, which the model does not have."""
    used = tower.config.num_hidden_layers
    config = CLIPVisionConfig(**{**tower.config.to_dict(), "num_hidden_layers": used + 1})
    clip = CLIPVisionModel(config)
    absent, unexpected = clip.load_state_dict(tower.state_dict(), strict=False)
    not_kept = (f"encoder.layers.{used}.", "post_layernorm.")
    assert not unexpected and all(name.startswith(not_kept) for name in absent)
    return clip


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    output: Annotated[Path, typer.Option(help="Folder of the parts.")] = Path("small-world/parts"),
) -> None:
    """Write the parts of a shipped model."""
    unbundle(model, output)


if __name__ == "__main__":
    typer.run(main)
