"""The branches, experts and thresholds of SliME (arXiv 2406.08487), asked at the size of the small one.

    python -m small_world.slime_ablation

Each row is the shipped model with another value of its configuration, without training. The paper trains its rows.
"""

import json
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
    data: Annotated[Path, typer.Option(help="Data set of the split fine-test.")] = Path("small-slime/test"),
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = MODEL,
    pictures: Annotated[int, typer.Option(help="Number of test pictures.")] = 400,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULTS,
) -> None:
    """Ask the model with other values of its configuration, and write the shares of right answers."""
    results = {}
    for name, config in ROWS.items():
        results[name] = ask(model, data, pictures, **config)
        typer.echo(f"{name}: {results[name]['accuracy']}")
    output.parent.mkdir(exist_ok=True)
    with replacing(output) as partial:
        partial.write_text(json.dumps({"pictures": pictures, "rows": results}, indent=1) + "\n", encoding="utf-8")
    Console().print(summarize(results))


if __name__ == "__main__":
    typer.run(main)
