"""Measure the memory that a conversion takes, on a checkpoint with a language model of more than 6 GB.

    python benchmarks/convert_memory.py [--directory DIR] [--layers N]

Every case runs in a process of its own. Only anonymous memory (`RssAnon`) in addition to that of the imports counts:
the kernel can reclaim the pages of mapped files. Needs disk space for about three checkpoints, which is freed at the
end; `--layers 1` tries the script out.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from fresh_process import run_alone
from golden_model import GOLDEN
from memory_watch import MemoryWatch
from random_checkpoints import save_random
from report import report

from mgllava.conversion import convert_checkpoint, export_xtuner

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32001

CASES = {
    "convert, 5 GB shards": {"max_shard_size": "5GB"},
    "convert, 1 GB shards": {"max_shard_size": "1GB"},
    "convert to float16, 1 GB shards": {"max_shard_size": "1GB", "dtype": "float16"},
    "back to XTuner": {},
}


def language_model_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a Llama with some layers of the 7B model, by name."""
    shapes: dict[str, tuple[int, ...]] = {"llm.model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"llm.model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return {**shapes, "llm.model.norm.weight": (HIDDEN,), "llm.lm_head.weight": (VOCABULARY, HIDDEN)}


def write_sources(directory: Path, layers: int) -> None:
    """Write the checkpoint in bfloat16, and a language model folder with a fitting config."""
    golden = torch.load(GOLDEN / "xtuner" / "iter_10.pth", weights_only=True)
    rest = {key: value.bfloat16() for key, value in golden["state_dict"].items() if not key.startswith("llm.")}
    for projector in ("projector", "bbox_projector"):
        width = rest[f"{projector}.model.0.weight"].shape[1]
        rest[f"{projector}.model.0.weight"] = torch.randn(HIDDEN, width).bfloat16()
        rest[f"{projector}.model.2.weight"] = torch.randn(HIDDEN, HIDDEN).bfloat16()
        for layer in (0, 2):
            rest[f"{projector}.model.{layer}.bias"] = torch.randn(HIDDEN).bfloat16()
    save_random(directory / "iter.pth", language_model_shapes(layers), meta=golden["meta"], state_dict=rest)
    shutil.copytree(GOLDEN / "llm", directory / "llm", ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((directory / "llm" / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    (directory / "llm" / "config.json").write_text(json.dumps(config))


def run_case(case: str, directory: Path) -> dict[str, float]:
    """Run one case in this process and measure its memory."""
    with MemoryWatch() as watch:
        if case == "back to XTuner":
            export_xtuner(directory / "out", directory / "back.pth")
        else:
            convert_checkpoint(
                directory / "iter.pth",
                directory / "llm",
                GOLDEN / "clip",
                GOLDEN / "convnext",
                "vicuna",
                directory / "out",
                overwrite=True,
                **CASES[case],
            )
    return {"extra": watch.extra_gb, "mapped": watch.mapped_gb, "seconds": watch.seconds}


def main(
    directory: Annotated[Path | None, typer.Option(help="folder for the files; by default a temporary one")] = None,
    layers: Annotated[int, typer.Option(help="layers of the language model")] = 14,
) -> None:
    """Run every case, and print and store the table."""
    rows = []
    with tempfile.TemporaryDirectory(dir=directory, prefix="mgllava-memory-") as name:
        folder = Path(name)
        write_sources(folder, layers)
        size = (folder / "iter.pth").stat().st_size / 1e9
        for case, options in CASES.items():
            figures = run_alone(run_case, case, folder)
            shard = float(options["max_shard_size"].removesuffix("GB")) if options else None
            rows.append(
                {
                    "case": case,
                    "checkpoint GB": size,
                    "extra memory GB": figures["extra"],
                    "of a shard": figures["extra"] / shard if shard else "-",
                    "mapped GB (reclaimable)": figures["mapped"],
                    "seconds": figures["seconds"],
                }
            )
        # The round trip must keep every value.
        _compare(folder / "iter.pth", folder / "back.pth")
    report("convert_memory", "Memory beyond imports while converting", rows)


def _compare(first: Path, second: Path) -> None:
    one, other = (torch.load(path, weights_only=True, mmap=True)["state_dict"] for path in (first, second))
    assert list(one) == list(other)
    # The exported model is that of the last conversion, in float16.
    assert all(torch.equal(value.half(), other[name]) for name, value in one.items())


if __name__ == "__main__":
    typer.run(main)
