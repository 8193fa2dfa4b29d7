"""The branches, experts, thresholds and stages of SliME (arXiv 2406.08487), compared at the size of the small one.

    python -m small_world.slime_ablation asked trained

Groups: `asked` (the shipped model with other values of its configuration, without training) and `trained` (a model for
each row, from the same start, trained in equally many steps of reading print). Results are written to
`small_world/results/slime_ablation.json`. Finished models are kept, and an interrupted training is resumed.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mgllava.atomic_files import replacing
from mgllava.training import load_recipe, train

from .evaluation import accuracy, answer_questions, load_model, read_questions
from .questions import FINE_KINDS

_HERE = Path(__file__).parent
RESULTS = _HERE / "results" / "slime_ablation.json"
MODEL = _HERE / "slime_model"
_READING = _HERE / "recipes" / "small_slime_reading.yaml"
GROUPS = ("asked", "trained")
ROWS: dict[str, dict[str, Any]] = {
    "both": {},
    "global only": {"branch": "global"},
    "local only": {"branch": "local"},
    "expert 0": {"forced_expert": 0},
    "expert 1": {"forced_expert": 1},
    "top-p 1.0": {"router_top_p": 1.0},
    "top-p 0.8": {"router_top_p": 0.8},
    "top-p 0.5": {"router_top_p": 0.5},
}


@dataclass(frozen=True)
class Stage:
    """A stage before the last: adapters learn from captions, and the language model is frozen."""

    config: Mapping[str, Any]
    train: tuple[str, ...]


def _stage_of_paper(name: str) -> Stage:
    recipe = load_recipe(f"slime_stage_{name}.yaml")
    return Stage(recipe.model.config, tuple(recipe.train))


@dataclass(frozen=True)
class TrainedRow:
    """A model that is trained: values of its configuration, and the stages before the last."""

    config: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()


# The stages before the last share these parts of all steps. In the paper, each has an eighth to a seventh.
_SHARE_OF_STAGES = 3 / 8
_ALTERNATING = tuple(_stage_of_paper(name) for name in ("1a", "1b", "2"))
# What the three stages learn, from the same captions in as many steps, at once.
_JOINT = Stage(
    {"branch": "both", "forced_expert": None, "router_top_p": 1.0}, ("multi_modal_projector", "local_compressor")
)
TRAINED_ROWS = {
    **{name: TrainedRow(ROWS[name]) for name in ("both", "global only", "local only", "expert 0", "expert 1")},
    "top-p 1.0": TrainedRow(ROWS["top-p 1.0"]),
    "captions first, adapters joint": TrainedRow(stages=(_JOINT,)),
    "captions first, adapters alternating": TrainedRow(stages=_ALTERNATING),
}


def ask(folder: Path, data: Path, pictures: int, kinds: Collection[str] = FINE_KINDS, **config: Any) -> dict[str, Any]:
    """Return the shares of right answers of a model, and how many questions there are of each kind."""
    model, processor = load_model(folder, **config)
    questions = [question for question in read_questions(data, pictures) if question["kind"] in kinds]
    answers = list(answer_questions(model, processor, questions, data / "images", None))
    asked = {kind: sum(answer.kind == kind for answer in answers) for kind in kinds}
    return {"accuracy": accuracy(answers), "questions": {**asked, "all": len(answers)}}


def train_row(row: TrainedRow, world: Path, folder: Path, steps: int, seed: int, bf16: bool) -> Path:
    """Train the model of a row in `folder`, unless it exists, and return its folder."""
    of_stages = round(_SHARE_OF_STAGES * steps) // len(row.stages) if row.stages else 0
    start = world / "ablation" / "start"
    for number, stage in enumerate([*row.stages, None], 1):
        output = folder / f"stage-{number}"
        if not (output / "config.json").exists():
            recipe = load_recipe(_READING)
            recipe.model.name = str(start)
            recipe.data.images = str(world / "train" / "images")
            recipe.training |= {"output_dir": str(output), "seed": seed, "bf16": bf16, "use_cpu": bf16}
            if stage is None:
                recipe.model.config |= row.config
                recipe.data.samples = str(world / "train" / "reading.json")
                recipe.training["max_steps"] = steps - of_stages * len(row.stages)
            else:
                recipe.model.config |= stage.config
                recipe.train = list(stage.train)
                rates = recipe.learning_rates or {}
                recipe.learning_rates = {
                    name: rate for name, rate in rates.items() if name.startswith(tuple(stage.train))
                }
                recipe.data.samples = str(world / "train" / "captions.json")
                recipe.training["max_steps"] = of_stages
            train(recipe, resume=True)
        start = output
    return start


def summarize(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of right answers in percent, with standard errors, from the results of the rows."""
    table = Table(title="right answers, %")
    columns = [*next(iter(results.values()))["questions"]]
    for column in ("row", *columns):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, result in results.items():
        shares = [(result["accuracy"][kind], result["questions"][kind]) for kind in columns]
        cells = (f"{100 * share:.1f} ± {100 * (share * (1 - share) / count) ** 0.5:.1f}" for share, count in shares)
        table.add_row(name, *cells)
    return table


def main(
    groups: Annotated[list[str], typer.Argument(help=f"Groups to run: {', '.join(GROUPS)}.")],
    world: Annotated[Path, typer.Option(help="Folder with `train`, `test` and `ablation/start`.")] = Path(
        "small-slime"
    ),
    model: Annotated[Path, typer.Option(help="Folder of the model that is asked.")] = MODEL,
    pictures: Annotated[int, typer.Option(help="Number of test pictures.")] = 400,
    steps: Annotated[int, typer.Option(help="Steps of each trained row.")] = 300,
    rows: Annotated[list[str] | None, typer.Option(help="Rows to train; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the samples.")] = 0,
    bf16: Annotated[bool, typer.Option(help="Compute matrix products in bfloat16.")] = True,
    output: Annotated[Path, typer.Option(help="JSON file that the results are added to.")] = RESULTS,
) -> None:
    """Ask or train the models of the rows, and write the shares of right answers."""
    for group in groups:
        if group not in GROUPS:
            raise typer.BadParameter(f"expected some of {', '.join(GROUPS)}, got {group!r}", param_hint="groups")
    for name in rows or ():
        if name not in TRAINED_ROWS:
            raise typer.BadParameter(f"expected some of {', '.join(TRAINED_ROWS)}, got {name!r}", param_hint="--rows")
    file: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}

    def write(results: dict[str, Any], name: str, result: dict[str, Any]) -> None:
        typer.echo(f"{name}: {result['accuracy']}")
        results[name] = result
        output.parent.mkdir(exist_ok=True)
        with replacing(output) as partial:
            partial.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")

    if "asked" in groups:
        file |= {"pictures": pictures, "rows": {}}
        for name, config in ROWS.items():
            write(file["rows"], name, ask(model, world / "test", pictures, **config))
        Console().print(summarize(file["rows"]))
    if "trained" in groups:
        settings = {"steps": steps, "bf16": bf16, "pictures": pictures}
        trained = file.setdefault("trained", {"settings": settings, "rows": {}})
        if trained["settings"] != settings:
            raise typer.BadParameter(
                f"{output} has results with the settings {trained['settings']}, which cannot be compared with results "
                f"with {settings}; name another --output",
                param_hint="--output",
            )
        for name in rows or TRAINED_ROWS:
            row = TRAINED_ROWS[name]
            folder = world / "ablation" / f"{name.replace(',', '').replace(' ', '-')}-seed{seed}-{steps}"
            last = train_row(row, world, folder, steps, seed, bf16)
            write(trained["rows"], f"{name}, seed {seed}", ask(last, world / "test", pictures, ("reading",)))
        Console().print(summarize(trained["rows"]))


if __name__ == "__main__":
    typer.run(main)
