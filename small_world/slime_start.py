"""Write the model that the training of the small SliME starts from.

    python -m small_world.slime_start --parts small-slime/parts --output small-slime/start

It joins the language model and the tower of the parts, like `mgllava train` does, and changes two things. The chat
template is the one that the language model was pretrained with. And the query adapters start by attending to their own
place: with random weights, attention is uniform, so all tokens of a view are the same, and too few pictures are seen
here to learn places from captions.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import AutoModel, AutoProcessor

from mgllava.processing import CHAT_TEMPLATES
from mgllava.training.starting_model import write_starting_model

from .parts import Part

# Tokens of a tile, one for each four cells of the tower's grid, as in the paper.
NUM_LOCAL_QUERIES = 16
# Of the sine-cosine embeddings, the highest frequencies, which tell neighboring cells apart.
_FREQUENCIES = 4
# Weights of the norms. Contents and random queries would outweigh the places otherwise.
_CONTENTS, _QUERIES = 0.2, 0.1


@torch.no_grad()
def attend_to_own_place(adapter: nn.Module, sharpness: float) -> None:
    """Let the queries of a query adapter attend to the cells at their place, and copy what is there.

    `sharpness` is about twice the difference of attention logits between a place and the one next to it.
    """
    width = adapter.queries.shape[1]
    quarter = width // 4
    kept = torch.zeros(4, quarter)
    kept[:, :_FREQUENCIES] = 1
    places = (sharpness * width**0.5) ** 0.5 * torch.diag(kept.flatten())
    for layer in (adapter.q_proj, adapter.k_proj):
        layer.weight += places
    for layer in (adapter.v_proj, adapter.out_proj):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    adapter.context_norm.weight.fill_(_CONTENTS)
    adapter.query_norm.weight.fill_(_QUERIES)


def write_start(parts: Path, output: Path, seed: int = 0) -> None:
    """Write the model and its processor to `output`, which must not exist."""
    torch.manual_seed(seed)
    write_starting_model(
        output,
        family="slime",
        prompt_template="v1",
        dtype=torch.float32,
        llm=parts / Part.LANGUAGE_MODEL.value,
        vision_tower=parts / Part.TILE_TOWER.value,
        num_local_queries=NUM_LOCAL_QUERIES,
    )
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    attend_to_own_place(model.model.multi_modal_projector.query_adapter, sharpness=2.5)
    # The places of its four times as many keys are half as far apart.
    attend_to_own_place(model.model.local_compressor, sharpness=5.0)
    model.save_pretrained(output)
    processor.chat_template = CHAT_TEMPLATES["vicuna"]
    processor.save_pretrained(output)


def main(
    parts: Annotated[Path, typer.Option(help="Folder of the parts.")] = Path("small-slime/parts"),
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("small-slime/start"),
) -> None:
    """Write the model that stage I-a starts from."""
    write_start(parts, output)


if __name__ == "__main__":
    typer.run(main)
