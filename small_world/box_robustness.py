"""Measure how much the small model needs its boxes: accuracy with boxes dropped, moved, and of other pictures.

    python -m small_world.box_robustness

It draws new pictures into `small-robustness`, finds their boxes once, and answers the same questions under every
change of the boxes, through the code of `mgllava eval`. Results go to `small_world/results/box_robustness.json` and
`docs/box_robustness.png`. Finished settings are kept, so an interrupted run resumes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from mgllava.atomic_files import replacing
from mgllava.box_files import read_boxes, write_boxes
from mgllava.evaluation import Answerer, BoxChanges, BoxSource, load_task
from mgllava.evaluation.evaluate import finish
from mgllava.evaluation.job import Boxes, answer_task
from mgllava.noise import hide_noise

from .dataset import write_dataset
from .demo import MODEL
from .evaluation import detect_boxes, load_model, read_questions

RESULT = Path(__file__).parent / "results" / "box_robustness.json"
PICTURE = Path(__file__).parents[1] / "docs" / "box_robustness.png"
# No training, test or demo uses these seeds.
_FIRST_SEED = 2_000_000
_QUESTIONS_PER_PICTURE = 5
DROPS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SHIFTS = (0, 2, 4, 8, 16, 32)
_ANSWER_TOKENS = 8


def measure(folder: Path, model: Path, pictures: int, console: Console) -> dict[str, Any]:
    """Answer the questions under each change, and return the accuracy of all, and by kind of question."""
    data = folder / "pictures"
    write_dataset(data, "test", pictures, questions=_QUESTIONS_PER_PICTURE, first=_FIRST_SEED)
    loaded, processor = load_model(model)
    box_file = folder / "boxes.json"
    if not box_file.exists():
        found = detect_boxes(processor, read_questions(data), data / "images")
        write_boxes(
            box_file,
            [
                {
                    "id": key,
                    "boxes": item["boxes"].tolist(),
                    "labels": item["labels"],
                    "scores": item["scores"].tolist(),
                }
                for key, item in found.items()
            ],
        )
    task = load_task("exact-match", data / "questions.jsonl", image_folder=data / "images", box_key="image_id")
    answerer = Answerer(loaded, processor, _ANSWER_TOKENS)

    def accuracy(name: str, changes: BoxChanges) -> dict[str, float]:
        output, boxes = folder / name, Boxes(BoxSource.FILE, read_boxes(box_file), changes)
        settings = {"model": str(model), "changes": changes.settings}
        answers = answer_task(task, lambda: answerer, boxes, output, settings, batch_size=32, resume=True)
        result = finish(task, answers or [], output, settings, str(model))
        console.print(f"{name}: {result.scores['accuracy']:.1f}")
        scores = {"all": result.scores["accuracy"], **result.categories}
        return {kind: round(score, 2) for kind, score in scores.items()}

    return {
        "command": "python -m small_world.box_robustness",
        "pictures": pictures,
        "questions": len(task.questions),
        "first_seed": _FIRST_SEED,
        "torch": torch.__version__,
        "drop": {str(drop): accuracy(f"drop-{drop}", BoxChanges(drop=drop)) for drop in DROPS},
        "shift": {str(shift): accuracy(f"shift-{shift}", BoxChanges(shift=shift)) for shift in SHIFTS},
        "shuffle": accuracy("shuffle", BoxChanges(shuffle=True)),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw both curves; a dashed line is the accuracy with the boxes of other pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 3.6), sharey=True, layout="constrained")
    labels = {"drop": "share of boxes dropped", "shift": "boxes moved by (pixels)"}
    kinds: Sequence[str] = ("all", "existence", "shape", "count", "reading")
    for axis, (change, label) in zip(axes, labels.items(), strict=True):
        values = {float(amount): scores for amount, scores in result[change].items()}
        for kind in kinds:
            style = {"color": "black", "linewidth": 2.5, "zorder": 3} if kind == "all" else {"linewidth": 1.2}
            axis.plot(
                list(values), [scores[kind] for scores in values.values()], marker="o", ms=4, label=kind, **style
            )
        axis.axhline(
            result["shuffle"]["all"], color="black", linestyle="--", linewidth=1, label="all, boxes of other pictures"
        )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right answers (%)")
    axes[0].set_ylim(60, 101)
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for pictures and answers.")] = Path("small-robustness"),
    model: Annotated[Path, typer.Option(help="Folder of a model with its processor.")] = MODEL,
    pictures: Annotated[int, typer.Option(help="Number of new pictures.")] = 160,
    result: Annotated[Path, typer.Option(help="JSON file to write.")] = RESULT,
    picture: Annotated[Path, typer.Option(help="PNG file to write.")] = PICTURE,
) -> None:
    """Measure the accuracy under changes of the boxes, and draw it."""
    hide_noise()
    measured = measure(folder, model, pictures, Console(highlight=False))
    with replacing(result) as partial:
        partial.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    draw(measured, picture)


if __name__ == "__main__":
    typer.run(main)
