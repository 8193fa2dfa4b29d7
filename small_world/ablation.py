"""The paper's ablations (tables 4 and 5 of arXiv 2406.17770) at the size of the small model.

    python -m small_world.ablation main --seeds 3

Groups: `main` (low resolution only, objects, objects and Conv-Gate fusion), `fusion` (each way of fusing), `merging`
(each way of merging objects), `boxes` (which boxes the model is given). Every run goes through both stages from the
parts in `small-world/parts`, then answers the questions about the test pictures. Runs that are done are kept, and an
interrupted one goes on. Results go to `small_world/results/ablation.json`.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from mgllava import MGLlavaConfig
from mgllava.atomic_files import replacing

from .questions import KINDS
from .scenes import ANY_SHAPE, SHAPES

_HERE = Path(__file__).parent
RESULTS = _HERE / "results" / "ablation.json"
_FUSIONS, _MERGINGS = (get_args(MGLlavaConfig.__annotations__[name]) for name in ("fusion_type", "object_merging"))
# As COCO's 80 classes know some of what a picture shows, half of the shapes here.
_FIXED_LIST = SHAPES[::2]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        config (`Mapping[str, str]`): Arguments of `MGLlavaConfig`.
        boxes (`str`): Which boxes: `ram-plus`, `fixed-list` or `no-tags`.
    """

    config: Mapping[str, str]
    boxes: str = "ram-plus"


def _row(fusion: str = "conv_gate", merging: str = "concat", boxes: str = "ram-plus") -> Row:
    return Row({"fusion_type": fusion, "object_merging": merging}, boxes)


GROUPS: dict[str, dict[str, Row]] = {
    "main": {
        "low resolution only": _row("none", "none"),
        "+ objects": _row("none"),
        "+ objects + Conv-Gate": _row(),
    },
    "fusion": {f"fusion {name}": _row(fusion=name) for name in _FUSIONS},
    "merging": {f"merging {name}": _row(merging=name) for name in _MERGINGS},
    "boxes": {f"boxes {name}": _row(boxes=name) for name in ("no-tags", "fixed-list", "ram-plus")},
}


def run(row: Row, seed: int, world: Path, epochs: float) -> dict[str, float]:
    """Train and test one model.

    Args:
        row (`Row`): What it is like.
        seed (`int`): Of fusion, projectors and the order of samples.
        world (`Path`): Folder with parts, pictures and boxes.
        epochs (`float`): Passes of stage 2.

    Returns:
        `dict`: Share of right answers by kind.
    """
    name = "-".join([*row.config.values(), row.boxes, f"seed{seed}"])
    folder = world / "ablation" / name
    result = folder / "accuracy.json"
    if not result.exists():
        boxes = {split: _boxes(world, split, row.boxes) for split in ("train", "test")}
        config = [f"model.parts.config.{key}={value}" for key, value in row.config.items()]
        shared = [f"data.boxes={boxes['train']}", "data.allow_other_boxes=true", f"training.seed={seed}"]
        _train("small_stage_1.yaml", folder / "stage-1", *config, *shared)
        stage_2 = [f"model.name={folder / 'stage-1'}", f"training.num_train_epochs={epochs}"]
        _train("small_stage_2.yaml", folder / "stage-2", *stage_2, *shared)
        options = ["--data", world / "test", "--boxes", "file", "--box-file", boxes["test"], "--output", result]
        _call("small_world.evaluation", folder / "stage-2", *options)
    accuracy: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))["accuracy"]
    return accuracy


def _train(recipe: str, output: Path, *changes: str) -> None:
    if not (output / "config.json").exists():
        path = _HERE / "recipes" / recipe
        _call("mgllava.cli", "train", path, *changes, f"training.output_dir={output}", "--resume")


def _boxes(world: Path, split: str, kind: str) -> Path:
    """Find the boxes of a split, or name the file that has them."""
    output = world / split / f"detected-{kind}.json"
    if not output.exists():
        tags = {
            "ram-plus": ["--tagger", world / "parts" / "tagger"],
            "fixed-list": ["--labels", ",".join(_FIXED_LIST)],
            "no-tags": ["--labels", ANY_SHAPE],
        }[kind]
        options = ["--image-folder", world / split / "images", "--detector", world / "parts" / "detector"]
        options += ["--mode", "clean"]
        _call(
            "mgllava.cli", "detect", world / split / "captions.json", *options, *tags, "--output", output, "--resume"
        )
    return output


def _call(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def summarize(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Show mean and standard deviation over seeds, in percent.

    Args:
        results (`Mapping`): Shares by row, seed and kind.
    """
    table = Table(title="right answers, %")
    for column in ("row", "seeds", *KINDS, "all"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, seeds in results.items():
        cells = []
        for kind in (*KINDS, "all"):
            values = [100 * accuracy[kind] for accuracy in seeds.values()]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        table.add_row(name, str(len(seeds)), *cells)
    return table


def main(
    groups: Annotated[list[str], typer.Argument(help=f"Of {', '.join(GROUPS)}.")],
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    world: Annotated[Path, typer.Option(help="Folder with parts and pictures.")] = Path("small-world"),
    epochs: Annotated[float, typer.Option(help="Passes of stage 2.")] = 2,
    output: Annotated[Path, typer.Option(help="JSON file of all results; new ones are added.")] = RESULTS,
) -> None:
    """Train and test the models of some tables."""
    for group in groups:
        if group not in GROUPS:
            raise typer.BadParameter(f"expected some of {', '.join(GROUPS)}, got {group!r}", param_hint="groups")
    results: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    console = Console()
    for seed in range(seeds):
        for group in groups:
            for name, row in GROUPS[group].items():
                console.rule(f"{name}, seed {seed}")
                results.setdefault(group, {}).setdefault(name, {})[str(seed)] = run(row, seed, world, epochs)
                output.parent.mkdir(exist_ok=True)
                with replacing(output) as partial:
                    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for group in groups:
        console.print(summarize(results[group]))


if __name__ == "__main__":
    typer.run(main)
