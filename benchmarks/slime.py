"""SliME at real size against another way: one view after the other, a router that broadcasts, tokens that are masked.

Both ways run in this one command on the same random weights and inputs. The layers have the sizes of SliME-7B: some
layers of CLIP ViT-L (by default 2 of its 23), both adapters, and one layer of Vicuna. Usage:
`python benchmarks/slime.py [--device cuda]`.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from memory_watch import MemoryWatch
from report import report
from torch.nn import functional as F  # noqa: N812

from mgllava import SlimeConfig, SlimeModel
from mgllava.modeling.adapters_slime import route

# A photo of 1200 x 900 pixels gives two rows of three tiles.
ROWS, COLUMNS, TEXT_LENGTH = 2, 3, 100
LAYERS_OF_7B = 32
# Shares of the tiles' tokens for which the cost of the prefill is computed.
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


def broadcast_router(local: torch.Tensor, text: torch.Tensor, top_p: float) -> torch.Tensor:
    """Choose tokens the way the original does: all similarities of all tokens with all words at once."""
    scores = F.cosine_similarity(local[:, None], text[None], dim=-1).sum(-1)
    probabilities, order = scores.softmax(0).sort(descending=True)
    count = min(int((probabilities.cumsum(0) <= top_p).sum()) + 1, len(order))
    kept = torch.zeros(len(local), dtype=torch.bool, device=local.device)
    kept[order[:count]] = True
    return kept


def one_by_one(model: SlimeModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Encode views one after the other."""
    is_global = torch.tensor([True], device=pixels.device)
    encoded = []
    for index, view in enumerate(pixels):
        tokens = model.embed_views(view[None], is_global if index == 0 else ~is_global)
        encoded.append(tokens[0 if index == 0 else 1][0])
    return encoded


def at_once(model: SlimeModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Encode all views in one batch, as the model does."""
    is_global = torch.arange(len(pixels), device=pixels.device) == 0
    tokens = model.embed_views(pixels, is_global)
    return [*tokens[0], *tokens[1]]


def measure(action: Callable[[], Any], device: str, repeats: int) -> tuple[float, float, Any]:
    """Return the least seconds of several runs, the extra peak memory in GB, and the result.

    On CPUs these are seconds of processor time, which other programs do not lengthen.
    """
    seconds, peaks, result = [], [], None
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            result = action()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            peaks.append((torch.cuda.max_memory_allocated() - before) / 1e9)
        else:
            with MemoryWatch() as watch:
                start = time.process_time()
                result = action()
                seconds.append(time.process_time() - start)
            peaks.append(watch.extra_gb)
    return min(seconds), min(peaks), result


def prefill_flops(config: Any, length: int) -> float:
    """Count the multiplications and additions of the prefill of all layers, attention included."""
    width, middle = config.hidden_size, config.intermediate_size
    keys = width * config.num_key_value_heads // config.num_attention_heads
    per_token = 2 * (2 * width * width + 2 * width * keys + 3 * width * middle)
    return LAYERS_OF_7B * (per_token * length + 2 * length * length * width)


@torch.inference_mode()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Runs of which the best counts.")] = 3,
    vision_layers: Annotated[int, typer.Option(help="Layers of the vision tower, 23 in the published models.")] = 2,
) -> None:
    """Compare time and extra peak memory of the parts of one image."""
    torch.manual_seed(0)
    config = SlimeConfig()
    config.text_config.num_hidden_layers = 1
    config.vision_config.num_hidden_layers = vision_layers
    model = SlimeModel(config).eval().to(device)
    tiles = ROWS * COLUMNS
    pixels = torch.randn(1 + tiles, 3, 336, 336, device=device)

    slow, slow_gb, expected = measure(lambda: one_by_one(model, pixels), device, repeats)
    fast, fast_gb, encoded = measure(lambda: at_once(model, pixels), device, repeats)
    difference = max(float((one - other).abs().max()) for one, other in zip(expected, encoded, strict=True))
    rows = [
        _row(
            f"encode {1 + tiles} views, {vision_layers} layers",
            slow,
            fast,
            slow_gb,
            fast_gb,
            f"{difference:.1e} apart",
        )
    ]

    local = torch.cat(encoded[1:])
    text = model.get_input_embeddings()(torch.randint(3, 32000, (TEXT_LENGTH,), device=device))
    is_text = torch.ones(TEXT_LENGTH, dtype=torch.bool, device=device)
    slow, slow_gb, expected = measure(lambda: broadcast_router(local, text, config.router_top_p), device, repeats)
    fast, fast_gb, (kept, scores) = measure(
        lambda: route(local, text, is_text, config.router_top_p, config.router_temperature), device, repeats
    )
    same = int((expected == kept).sum())
    note = f"{int(kept.sum())} of {len(kept)} kept, {same} decisions equal"
    rows.append(_row("route", slow, fast, slow_gb, fast_gb, note))

    # Random weights tell tokens of tiles hardly apart, and nearly all are kept. Here half of them are.
    embeds = torch.cat([text, encoded[0], text[:1], local])[None]
    seen = torch.ones(embeds.shape[1], dtype=torch.bool, device=device)
    seen[-len(local) :] = scores > scores.median()
    mask, positions = seen[None].long(), (seen.long().cumsum(0) - 1).clamp(min=0)[None]

    def run(**inputs: torch.Tensor) -> torch.Tensor:
        return model.language_model(**inputs, use_cache=False).last_hidden_state

    slow, slow_gb, expected = measure(
        lambda: run(inputs_embeds=embeds, attention_mask=mask, position_ids=positions), device, repeats
    )
    fast, fast_gb, output = measure(lambda: run(inputs_embeds=embeds[:, seen]), device, repeats)
    difference = float((expected[:, seen] - output).abs().max())
    note = f"{int(seen.sum())} of {len(seen)} tokens, {difference:.1e} apart"
    rows.append(_row("prefill of one layer", slow, fast, slow_gb, fast_gb, note))
    clock = "seconds" if device == "cuda" else "seconds of processor time"
    report(f"slime_{device}", f"One image of {ROWS} x {COLUMNS} tiles at real size on {device}, {clock}", rows)

    counts = []
    without_tiles = len(seen) - len(local)
    for share in SHARES:
        length = without_tiles + round(share * len(local))
        flops = prefill_flops(config.text_config, length)
        counts.append(
            {
                "tiles' tokens kept": f"{share:.0%}",
                "tokens of the prompt": length,
                "prefill TFLOP of 7B": flops / 1e12,
                "of all": flops / prefill_flops(config.text_config, len(seen)),
            }
        )
    report(
        f"slime_flops_{device}", "Prefill of the language model by the share that the router keeps (computed)", counts
    )


def _row(part: str, slow: float, fast: float, slow_gb: float, fast_gb: float, note: str) -> dict[str, Any]:
    return {
        "part": part,
        "other way s": slow,
        "mgllava s": fast,
        "times faster": slow / fast,
        "other way GB": slow_gb,
        "mgllava GB": fast_gb,
        "": note,
    }


if __name__ == "__main__":
    typer.run(main)
