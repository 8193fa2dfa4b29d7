"""The ablations of SliME (arXiv 2406.08487) at the size of the small one.

    python -m small_world.slime_ablation --steps 500

Rows of the group `trained` are trained in stage III for the same number of steps, from the end of stage II. `joint`
starts where stage I-a starts, and is trained for the steps of the stages before in addition. Rows of the group
`switched` are the shipped model with another value of its configuration, without training. Finished rows are kept, and
an interrupted one is resumed. Results are written to `small_world/results/slime_ablation.json`.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mgllava.atomic_files import replacing

from .evaluation import accuracy, answer_questions, load_model, read_questions
from .questions import FINE_KINDS

_HERE = Path(__file__).parent
RESULTS = _HERE / "results" / "slime_ablation.json"
MODEL = _HERE / "slime_model"


@dataclass(frozen=True)
class Row:
    """A row of the table: values of the configuration, and whether the stages before stage III are left out."""

    config: dict[str, Any] = field(default_factory=dict)
    is_joint: bool = False


# The most telling first.
ROWS = {
    "both": Row(),
    "global only": Row({"branch": "global"}),
    "local only": Row({"branch": "local"}),
    "joint": Row(is_joint=True),
    "top-p 1.0": Row({"router_top_p": 1.0}),
    "expert 0": Row({"forced_expert": 0}),
    "expert 1": Row({"forced_expert": 1}),
}
SWITCHED: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "global only": {"branch": "global"},
    "local only": {"branch": "local"},
    "expert 0": {"forced_expert": 0},
    "expert 1": {"forced_expert": 1},
    "top-p 1.0": {"router_top_p": 1.0},
    "top-p 0.8": {"router_top_p": 0.8},
    "top-p 0.5": {"router_top_p": 0.5},
}


def train(name: str, row: Row, world: Path, steps: int, earlier_steps: int) -> Path:
    """Train a row, and return the folder of its model."""
    output = world / "ablation" / f"{name.replace(' ', '-')}-{steps}"
    if not (output / "config.json").exists():
        start, length = world / "stage-2", steps
        if row.is_joint:
            start, length = world / "start", steps + earlier_steps
        changes = [f"model.name={start}", f"training.output_dir={output}", f"training.max_steps={length}"]
        changes += [f"model.config.{key}={value}" for key, value in row.config.items()]
        changes += ["training.bf16=true", "training.use_cpu=true"]
        recipe = _HERE / "recipes" / "small_slime_3.yaml"
        subprocess.run([sys.executable, "-m", "mgllava", "train", recipe, *changes, "--resume"], check=True)
    return output


def ask(folder: Path, data: Path, pictures: int, **config: Any) -> dict[str, Any]:
    """Return the shares of right answers of a model, and how many questions there are of each kind."""
    model, processor = load_model(folder, **config)
    questions = read_questions(data, pictures)
    answers = list(answer_questions(model, processor, questions, data / "images", None))
    asked = {kind: sum(answer.kind == kind for answer in answers) for kind in FINE_KINDS}
    return {"accuracy": accuracy(answers), "questions": {**asked, "all": len(answers)}}


def summarize(results: dict[str, dict[str, Any]]) -> Table:
    """Return a table of right answers in percent, with standard errors, from the results of the rows."""
    table = Table(title="right answers, %")
    columns = (*FINE_KINDS, "all")
    for column in ("row", *columns):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, result in results.items():
        shares = [(result["accuracy"][kind], result["questions"][kind]) for kind in columns]
        cells = (f"{100 * share:.1f} ± {100 * (share * (1 - share) / count) ** 0.5:.1f}" for share, count in shares)
        table.add_row(name, *cells)
    return table


def main(
    rows: Annotated[list[str] | None, typer.Argument(help=f"Rows to train: {', '.join(ROWS)}; default all.")] = None,
    world: Annotated[Path, typer.Option(help="Folder of the training of the small SliME.")] = Path("small-slime"),
    model: Annotated[Path, typer.Option(help="Model whose configuration is switched.")] = MODEL,
    steps: Annotated[int, typer.Option(help="Steps of stage III.")] = 500,
    earlier_steps: Annotated[int, typer.Option(help="Steps of the stages before, which joint training adds.")] = 600,
    pictures: Annotated[int, typer.Option(help="Number of test pictures.")] = 400,
    switched: Annotated[bool, typer.Option(help="Ask the shipped model with other values too.")] = True,
    output: Annotated[Path, typer.Option(help="JSON file that the results are added to.")] = RESULTS,
) -> None:
    """Train and test the rows, and ask the shipped model with other values of its configuration."""
    chosen = rows or list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        raise typer.BadParameter(f"expected some of {', '.join(ROWS)}, got {unknown[0]!r}", param_hint="rows")
    settings = {"steps": steps, "earlier_steps": earlier_steps, "pictures": pictures}
    file: dict[str, Any] = {"settings": settings, "trained": {}, "switched": {}}
    if output.exists():
        file = json.loads(output.read_text(encoding="utf-8"))
        if file["settings"] != settings:
            raise typer.BadParameter(
                f"{output} has results with the settings {file['settings']}, which cannot be compared with results "
                f"with {settings}; name another --output",
                param_hint="--output",
            )
    jobs = [("trained", name) for name in chosen] + [("switched", name) for name in SWITCHED if switched]
    for group, name in jobs:
        if name in file[group]:
            continue
        if group == "trained":
            folder = train(name, ROWS[name], world, steps, earlier_steps)
            file[group][name] = ask(folder, world / "test", pictures)
        else:
            file[group][name] = ask(model, world / "test", pictures, **SWITCHED[name])
        output.parent.mkdir(exist_ok=True)
        with replacing(output) as partial:
            partial.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"{group}, {name}: {file[group][name]['accuracy']}")
    for group in ("trained", "switched"):
        Console().print(group, summarize(file[group]))


if __name__ == "__main__":
    typer.run(main)
