"""Write a data set of the small world, in the formats of real data: pictures, LLaVA samples, box files.

    python -m small_world.dataset small-world/train --count 20000
    python -m small_world.dataset small-world/test --split test --count 1000

The folder contains `images/*.jpg`, `captions.json` (one caption for each picture: alignment), `conversations.json`
(questions and answers: instruction tuning), `questions.jsonl` (the same questions one by one with their kind:
evaluation) and `boxes.json` (the true boxes, labeled with the shapes). In the `fine` splits, `reading.json` has more
questions about print. Existing pictures are kept, so an interrupted run can be resumed.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from mgllava.atomic_files import replacing
from mgllava.box_files import write_boxes

from .drawing import draw_scene
from .questions import CAPTION_REQUEST, FINE_KINDS, KINDS, ask, describe
from .scenes import Split, make_scene

# Questions about the print of a picture in `reading.json`.
_MOST_READING = 6


def make_sample(split: Split, number: int, images: Path, questions: int) -> dict[str, Any]:
    """Draw a scene, write its picture into `images` unless it exists, and return all that is known about it.

    `questions` is their greatest number. In the result `image` is a file name, `questions` is a list of `kind`,
    `text` and `answer`, and `boxes` are xyxy in pixels of the picture.
    """
    scene = make_scene(split, number)
    kinds = FINE_KINDS if split.startswith("fine") else KINDS
    picture, boxes = draw_scene(scene)
    path = images / f"{number:06d}.jpg"
    if not path.exists():
        with replacing(path) as partial:
            # Without chroma subsampling, which would change the colors of small objects.
            picture.save(partial, format="JPEG", quality=92, subsampling=0)
    return {
        "id": scene.id,
        "image": path.name,
        "caption": describe(scene),
        "questions": [vars(question) for question in ask(scene, questions, kinds)],
        "reading": [vars(question) for question in ask(scene, _MOST_READING, ("reading",))],
        "width": scene.width,
        "height": scene.height,
        "boxes": boxes,
        "labels": [item.shape for item in scene.objects],
        "scores": [1.0] * len(boxes),
    }


def write_dataset(
    folder: Path,
    split: Split,
    count: int,
    questions: int = 10,
    first: int = 0,
    processes: int | None = None,
) -> None:
    """Write a data set of `count` pictures, with at most `questions` about each; `first` is the first scene's seed.

    `processes` draw the pictures, by default one for each core. Existing text files are replaced.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    job = partial(make_sample, split, images=images, questions=questions)
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        done = pool.map(job, range(first, first + count), chunksize=20)
        samples = list(track(done, f"Drawing {folder}", total=count))
    write_json(folder / "captions.json", (_conversation(s, [(CAPTION_REQUEST, s["caption"])]) for s in samples))
    write_json(
        folder / "conversations.json",
        (_conversation(s, [(q["text"], q["answer"]) for q in s["questions"]]) for s in samples),
    )
    if split.startswith("fine"):
        asked = (s for s in samples if s["reading"])
        turns = ((s, [(q["text"], q["answer"]) for q in s["reading"]]) for s in asked)
        write_json(folder / "reading.json", (_conversation(*pair) for pair in turns))
    with replacing(folder / "questions.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for sample in samples:
            for number, question in enumerate(sample["questions"]):
                row = {"question_id": f"{sample['id']}/{number}", "image_id": sample["id"], "image": sample["image"]}
                file.write(json.dumps({**row, **question}) + "\n")
    write_boxes(folder / "boxes.json", samples)


def _conversation(sample: dict[str, Any], turns: list[tuple[str, str]]) -> dict[str, Any]:
    """Return a sample in LLaVA's format, with the image before the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        prefix = "<image>\n" if number == 0 else ""
        messages += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return {"id": sample["id"], "image": sample["image"], "conversations": messages}


def write_json(path: Path, values: Iterable[Any]) -> None:
    """Write values as a JSON list."""
    with replacing(path) as partial_path:
        partial_path.write_text(json.dumps(list(values), indent=1), encoding="utf-8")


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    split: Annotated[
        Split, typer.Option(help="Kind of scenes; unseen has the pairs of shape and color that the others lack.")
    ] = "train",
    count: Annotated[int, typer.Option(help="Number of pictures.")] = 20_000,
    questions: Annotated[int, typer.Option(help="Most questions about a picture.")] = 10,
    first: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
) -> None:
    """Write pictures, captions, questions and boxes of the small world."""
    write_dataset(folder, split, count, questions, first)


if __name__ == "__main__":
    typer.run(main)
