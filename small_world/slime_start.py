"""Write the model that the training of the small SliME starts from.

    python -m small_world.slime_start --parts small-slime/parts --output small-slime/start

It joins the language model and the tower of the parts, like `mgllava train` does, and changes two things. The chat
template is the one that the language model was pretrained with. And the query adapters start by copying what is at
their own place, at the scale of the tower: with random weights, attention is uniform, so all tokens of a view are the
same, and the norm at their end makes them a sixth as large as the tokens that the shared projection is for. Too few
pictures are seen here to learn that from captions. The projection starts as the least-squares map to words.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoModel, AutoProcessor

from mgllava.processing import CHAT_TEMPLATES
from mgllava.training.starting_model import write_starting_model

from .drawing import draw_scene
from .frames import cells_of_centers
from .parts import Part
from .parts.architecture import LOW_RES_IMAGE_SIZE
from .parts.tile_tower import Views
from .parts.towers import Normalize
from .parts.training import collate_pictures
from .pictures import CHARACTERS
from .scenes import COLORS, SHAPES, make_scene

# Tokens of a tile, one for each four cells of the tower's grid, as in the paper.
NUM_LOCAL_QUERIES = 16
# Of the sine-cosine embeddings, the highest frequencies, which tell neighboring cells apart.
_FREQUENCIES = 4
# Weights of the norms. Contents and random queries would outweigh the places otherwise.
_CONTENTS, _QUERIES = 0.07, 0.1
# Pictures from which the scale of the tower is taken.
_PICTURES = 8
# Views that the projection is aligned with, of which each picture has five.
_VIEWS, _VIEWS_OF_PICTURE, _VIEWS_AT_ONCE = 5000, 5, 250
_WEIGHT_OF_EMPTY = 0.1
# Divides the scores of the router. They are sums over the text, and a conversation of five questions is six times as
# long as one question: without this, a third of the tokens of tiles is kept in training, and five sixths in use.
_TEMPERATURE = 4.0


@torch.no_grad()
def attend_to_own_place(adapter: nn.Module, sharpness: float, scale: float) -> None:
    """Let the queries of a query adapter attend to the cells at their place, and copy what is there.

    `sharpness` is about the difference of attention logits between a place and the one next to it, `scale` the
    standard deviation of the output.
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
    adapter.output_norm.weight.fill_(scale)


@torch.no_grad()
def fit_linear(projector: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Let a projection compute the least-squares map from `x` to `y`, as far as its hidden layer allows.

    GELU(z) - GELU(-z) = z, so half of the hidden units hold the projections on the most important directions, and the
    others the same with the opposite sign. In closed form, because characters are a thousandth of the variance of the
    tokens, and gradient descent finds them late.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    # Most cells are empty: objects count more.
    weights = torch.where(y.abs().sum(-1) > 0, 1.0, _WEIGHT_OF_EMPTY).sqrt().unsqueeze(-1)
    a, b = ((x - mean_x) * weights).double(), ((y - mean_y) * weights).double()
    gram = a.T @ a
    ridge = 1e-5 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram + ridge, a.T @ b)
    # The directions that matter for the outputs on these inputs.
    _, _, directions = torch.linalg.svd((a @ solution)[: 20 * len(gram)], full_matrices=False)
    half = projector.linear_1.out_features // 2
    kept = directions[:half]
    inner = (solution @ kept.T).T.float()
    # Small units, where GELU is curved the same on both sides, which cancels out.
    projector.linear_1.weight.copy_(torch.cat([inner, -inner]))
    projector.linear_1.bias.copy_(torch.cat([-inner @ mean_x, inner @ mean_x]))
    projector.linear_2.weight.copy_(torch.cat([kept, -kept]).T.float())
    projector.linear_2.bias.copy_(mean_y)


def align_with_words(model: Any, tokenizer: Any, views: Views, num_views: int = _VIEWS) -> float:
    """Let the projection turn tokens into sums of word embeddings, and return the share of right characters.

    These are the oracle tokens that the language model was pretrained with: the sum of the words of the objects whose
    centers are in the cell or, for a tile, in the four cells that a token is compressed from.
    """
    body = model.model
    table = model.get_input_embeddings().weight.detach()
    words = [table[[tokenizer(word)["input_ids"][-1] for word in values]] for values in (SHAPES, COLORS, CHARACTERS)]
    shapes, colors, characters = words
    inputs, targets, wanted = [], [], []
    for first in range(0, num_views, _VIEWS_AT_ONCE):
        batch = collate_pictures([views[index] for index in range(first, first + _VIEWS_AT_ONCE)])
        pixels = Normalize()(batch["pixel_values"])
        is_global = torch.arange(first, first + _VIEWS_AT_ONCE) % _VIEWS_OF_PICTURE == 0
        with torch.no_grad():
            tokens = body.vision_tower(pixels).last_hidden_state[:, 1:]
            compressed = body.local_compressor(tokens[~is_global])
        shape, color, _, character = batch["attributes"].unbind(-1)
        exists = (shape >= 0).unsqueeze(-1)
        embeddings = shapes[shape.clamp(min=0)] + colors[color.clamp(min=0)]
        embeddings = embeddings + characters[(character - 1).clamp(min=0)] * (character > 0).unsqueeze(-1)
        for chosen, given in ((is_global, tokens[is_global]), (~is_global, compressed)):
            grid = round(given.shape[1] ** 0.5)
            cells = cells_of_centers(batch["boxes"][chosen], grid, LOW_RES_IMAGE_SIZE)
            target = torch.zeros(*given.shape[:2], table.shape[1])
            index = cells.unsqueeze(-1).expand(-1, -1, table.shape[1])
            target.scatter_add_(1, index, embeddings[chosen] * exists[chosen])
            said = torch.full(given.shape[:2], -1)
            said.scatter_(1, cells, torch.where(exists[chosen, :, 0], character[chosen] - 1, -1))
            if grid < round(tokens.shape[1] ** 0.5):
                wanted.append(said.flatten())
            else:
                wanted.append(torch.full((said.numel(),), -1))
            inputs.append(given.flatten(0, 1))
            targets.append(target.flatten(0, 1))
    x, y, said = torch.cat(inputs), torch.cat(targets), torch.cat(wanted)
    fit_linear(body.multi_modal_projector, x, y)
    projector = body.multi_modal_projector
    with torch.no_grad():
        asked = said >= 0
        right = (projector.project(x[asked]) @ characters.T).argmax(-1) == said[asked]
    return float(right.float().mean())


def write_start(parts: Path, output: Path, data: Path, seed: int = 0) -> float:
    """Write the model and its processor to `output`, which must not exist; see [`align_with_words`] for the result."""
    torch.manual_seed(seed)
    write_starting_model(
        output,
        family="slime",
        prompt_template="v1",
        dtype=torch.float32,
        llm=parts / Part.LANGUAGE_MODEL.value,
        vision_tower=parts / Part.TILE_TOWER.value,
        num_local_queries=NUM_LOCAL_QUERIES,
        router_temperature=_TEMPERATURE,
    )
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    pictures = [draw_scene(make_scene("fine", number))[0] for number in range(_PICTURES)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scale = float(model.model.vision_tower(pixels).last_hidden_state[:, 1:].std())
    attend_to_own_place(model.model.multi_modal_projector.query_adapter, 5.0, scale)
    # The places of its four times as many keys are half as far apart.
    attend_to_own_place(model.model.local_compressor, 10.0, scale)
    right = align_with_words(model, processor.tokenizer, Views(data))
    model.save_pretrained(output)
    processor.chat_template = CHAT_TEMPLATES["vicuna"]
    processor.save_pretrained(output)
    return right


def main(
    parts: Annotated[Path, typer.Option(help="Folder of the parts.")] = Path("small-slime/parts"),
    data: Annotated[Path, typer.Option(help="Data set to align with.")] = Path("small-slime/crowded"),
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("small-slime/start"),
) -> None:
    """Write the model that training starts from."""
    right = write_start(parts, output, data)
    typer.echo(f"Wrote {output}; {100 * right:.0f} % of the characters on tiles are nearest to their words")


if __name__ == "__main__":
    typer.run(main)
