"""The paper's ablations (tables 4 and 5 of arXiv 2406.17770) at the size of the small model.

    python -m small_world.ablation main --seeds 3

Groups: `main` (low resolution only, objects, objects and Conv-Gate fusion), `fusion` (each `fusion_type`), `merging`
(each `object_merging`), `boxes` (boxes from different detectors). Every run trains both stages from the parts in
`small-world/parts` (`small_world.unbundle` writes those of the shipped model), then answers the questions about the
test pictures. Finished runs are kept, and an interrupted run is resumed. Results are written to
`small_world/results/ablation.json`.

`--jobs 2` trains two models in parallel, which is faster than one after the other.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from mgllava import MGLlavaConfig
from mgllava.atomic_files import replacing

from .parts import Part
from .questions import KINDS
from .scenes import ANY_SHAPE, SHAPES

_HERE = Path(__file__).parent
RESULTS = _HERE / "results" / "ablation.json"
_FUSIONS, _MERGINGS = (get_args(MGLlavaConfig.__annotations__[name]) for name in ("fusion_type", "object_merging"))
# In place of the classes of COCO, which cover only some of the objects in a picture: half of the shapes.
_FIXED_LIST = SHAPES[::2]


@dataclass(frozen=True)
class Row:
    """A row of a table: a variant of the model, and the boxes that it is given."""

    fusion_type: str = "conv_gate"
    object_merging: str = "concat"
    # `ram-plus`, `fixed-list` or `no-tags`.
    boxes: str = "ram-plus"

    @property
    def config(self) -> dict[str, str]:
        """Arguments of `MGLlavaConfig`."""
        return {"fusion_type": self.fusion_type, "object_merging": self.object_merging}


GROUPS: dict[str, dict[str, Row]] = {
    "main": {
        "low resolution only": Row("none", "none"),
        "+ objects": Row("none"),
        "+ objects + Conv-Gate": Row(),
    },
    "fusion": {f"fusion {name}": Row(fusion_type=name) for name in _FUSIONS},
    "merging": {f"merging {name}": Row(object_merging=name) for name in _MERGINGS},
    "boxes": {f"boxes {name}": Row(boxes=name) for name in ("no-tags", "fixed-list", "ram-plus")},
}


@dataclass(frozen=True)
class Effort:
    """How long every model of a table is trained, and on how many pictures it is tested."""

    # Passes of stage 1 over the captions.
    alignment: float
    # Passes of stage 2 over questions and captions.
    tuning: float
    # Whether matrix products are computed in bfloat16.
    bf16: bool
    pictures: int
    # Threads of a run.
    threads: int


def run(row: Row, seed: int, world: Path, effort: Effort) -> dict[str, float]:
    """Train and test one model, and return its share of right answers by kind.

    The seed determines the initial fusion and projectors and the order of the samples.
    """
    passes = f"{effort.alignment:g}-{effort.tuning:g}-{'bf16' if effort.bf16 else 'fp32'}"
    name = "-".join([*row.config.values(), row.boxes, f"seed{seed}", passes])
    folder = world / "ablation" / name
    result = folder / "accuracy.json"
    if not result.exists():
        train, test = world / "train", world / "test"
        parts = {"llm": Part.LANGUAGE_MODEL, "vision_tower": Part.VISION_TOWER, "high_res_tower": Part.HIGH_RES_TOWER}
        start = [f"model.parts.{key}={_part(world, part)}" for key, part in parts.items()]
        start += [f"model.parts.config.{key}={value}" for key, value in row.config.items()]
        captions, conversations = train / "captions.json", train / "conversations.json"
        shared = [f"data.images={train / 'images'}", f"data.boxes={_box_file(train, row.boxes)}"]
        shared += ["data.allow_other_boxes=true", f"training.seed={seed}", f"training.bf16={str(effort.bf16).lower()}"]
        if effort.bf16 and not torch.cuda.is_available():
            shared.append("training.use_cpu=true")  # transformers refuses bf16 on a CPU without it
        for stage, changes, epochs in (
            (1, [*start, f"data.samples={captions}"], effort.alignment),
            (2, [f"model.name={folder / 'stage-1'}", f"data.samples=[{conversations},{captions}]"], effort.tuning),
        ):
            output = folder / f"stage-{stage}"
            if not (output / "config.json").exists():
                recipe = _HERE / "recipes" / f"small_stage_{stage}.yaml"
                changes += [*shared, f"training.num_train_epochs={epochs}", f"training.output_dir={output}"]
                _call("mgllava", "train", recipe, *changes, "--resume", threads=effort.threads)
        options = ["--data", test, "--boxes", "file", "--box-file", _box_file(test, row.boxes), "--output", result]
        options += ["--count", effort.pictures]
        _call("small_world.evaluation", folder / "stage-2", *options, threads=effort.threads)
    accuracy: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))["accuracy"]
    return accuracy


def find_boxes(world: Path, split: str, kind: str) -> None:
    """Detect the boxes of a split, unless their file exists; `kind` is `Row.boxes`."""
    output = _box_file(world / split, kind)
    if not output.exists():
        tags = {
            "ram-plus": ["--tagger", _part(world, Part.TAGGER)],
            "fixed-list": ["--labels", ",".join(_FIXED_LIST)],
            "no-tags": ["--labels", ANY_SHAPE],
        }[kind]
        options = ["--image-folder", world / split / "images", "--detector", _part(world, Part.DETECTOR)]
        options += ["--mode", "clean"]
        _call("mgllava", "detect", world / split / "captions.json", *options, *tags, "--output", output, "--resume")


def _part(world: Path, part: Part) -> Path:
    return world / "parts" / part.value


def _box_file(folder: Path, kind: str) -> Path:
    return folder / f"detected-{kind}.json"


def _call(module: str, *arguments: object, threads: int | None = None) -> None:
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, env=environment)


def summarize(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Return a table of mean and standard deviation over seeds, from shares of right answers by row, seed and kind."""
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
    groups: Annotated[list[str], typer.Argument(help=f"Groups to run: {', '.join(GROUPS)}.")],
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 1,
    world: Annotated[Path, typer.Option(help="Folder with parts and pictures.")] = Path("small-world"),
    alignment: Annotated[float, typer.Option(help="Passes of stage 1.")] = 1,
    tuning: Annotated[float, typer.Option(help="Passes of stage 2.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute matrix products in bfloat16.")] = False,
    pictures: Annotated[int, typer.Option(help="Number of test pictures.")] = 600,
    jobs: Annotated[int, typer.Option(help="Number of parallel runs, which share the cores.")] = 1,
    output: Annotated[Path, typer.Option(help="JSON file that the results are added to.")] = RESULTS,
) -> None:
    """Train and test the models of one or more tables."""
    for group in groups:
        if group not in GROUPS:
            raise typer.BadParameter(f"expected some of {', '.join(GROUPS)}, got {group!r}", param_hint="groups")
    settings = {"alignment": alignment, "tuning": tuning, "bf16": bf16, "pictures": pictures}
    file: dict[str, Any] = {"settings": settings, "results": {}}
    if output.exists():
        file = json.loads(output.read_text(encoding="utf-8"))
        if file["settings"] != settings:
            raise typer.BadParameter(
                f"{output} has results with the settings {file['settings']}, which cannot be compared with results "
                f"with {settings}; name another --output",
                param_hint="--output",
            )
    results = file["results"]
    console = Console()
    effort = Effort(**settings, threads=max(1, (os.cpu_count() or 1) // jobs))
    # A row that several tables share is trained once.
    places: dict[tuple[int, Row], list[tuple[str, str]]] = {}
    for seed in range(seeds):
        for group in groups:
            for name, row in GROUPS[group].items():
                places.setdefault((seed, row), []).append((group, name))
    for kind in sorted({row.boxes for _, row in places}):
        for split in ("train", "test"):
            find_boxes(world, split, kind)
    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(run, row, seed, world, effort): (seed, row) for seed, row in places}
        for done in as_completed(runs):
            seed, row = runs[done]
            for group, name in places[seed, row]:
                console.rule(f"{name}, seed {seed}")
                results.setdefault(group, {}).setdefault(name, {})[str(seed)] = done.result()
            output.parent.mkdir(exist_ok=True)
            with replacing(output) as partial:
                partial.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")
    for group in groups:
        console.print(summarize(results[group]))


if __name__ == "__main__":
    typer.run(main)
