"""The small world on disk, in the formats of real data: pictures, LLaVA samples, box files.

    python -m small_world.dataset small-world/train --count 20000
    python -m small_world.dataset small-world/test --split test --count 1000

FOLDER gets `images/*.jpg`, `captions.json` (one caption for each picture: alignment), `conversations.json` (questions
and answers: instruction tuning), `questions.jsonl` (the same questions one by one with their kind: evaluation) and
`boxes.json` (the true boxes, labeled with the shapes). Pictures that are there already are kept, so a run that was
interrupted goes on where it was.
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
from .questions import CAPTION_REQUEST, ask, describe
from .scenes import Split, make_scene


def make_sample(split: Split, number: int, images: Path, questions: int) -> dict[str, Any]:
    """Draw one picture and write it, unless it is there, and say what there is to know about it.

    Args:
        split (`str`): See [`make_scene`].
        number (`int`): Seed of the scene within the split.
        images (`Path`): Folder of the pictures; it exists.
        questions (`int`): Number of questions, at most.

    Returns:
        `dict` with `id`, `image` (file name), `caption`, `questions` (a list of `kind`, `text`, `answer`), `width`,
        `height`, `boxes` (xyxy in pixels of the picture), `labels` and `scores`.
    """
    scene = make_scene(split, number)
    picture, boxes = draw_scene(scene)
    path = images / f"{number:06d}.jpg"
    if not path.exists():
        with replacing(path) as partial:
            # Full chroma: halved, small objects would lose their colors, not only their sharpness.
            picture.save(partial, format="JPEG", quality=92, subsampling=0)
    return {
        "id": scene.id,
        "image": path.name,
        "caption": describe(scene),
        "questions": [vars(question) for question in ask(scene, questions)],
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
    """Write a data set.

    Args:
        folder (`Path`): Where to. Its text files are replaced, each at once.
        split (`str`): See [`make_scene`].
        count (`int`): Number of pictures.
        questions (`int`, *optional*, defaults to 10): Number of questions about each picture, at most.
        first (`int`, *optional*, defaults to 0): Seed of the first picture; the others follow.
        processes (`int`, *optional*): How many draw, by default one for each core.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    job = partial(make_sample, split, images=images, questions=questions)
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        done = pool.map(job, range(first, first + count), chunksize=20)
        samples = list(track(done, f"Drawing {folder}", total=count))
    _write_json(folder / "captions.json", (_conversation(s, [(CAPTION_REQUEST, s["caption"])]) for s in samples))
    _write_json(
        folder / "conversations.json",
        (_conversation(s, [(q["text"], q["answer"]) for q in s["questions"]]) for s in samples),
    )
    with replacing(folder / "questions.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for sample in samples:
            for number, question in enumerate(sample["questions"]):
                row = {"question_id": f"{sample['id']}/{number}", "image_id": sample["id"], "image": sample["image"]}
                file.write(json.dumps({**row, **question}) + "\n")
    write_boxes(folder / "boxes.json", samples)


def _conversation(sample: dict[str, Any], turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A sample as LLaVA's files have it: the image in front of the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        prefix = "<image>\n" if number == 0 else ""
        messages += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return {"id": sample["id"], "image": sample["image"], "conversations": messages}


def _write_json(path: Path, values: Iterable[Any]) -> None:
    with replacing(path) as partial_path:
        partial_path.write_text(json.dumps(list(values), indent=1), encoding="utf-8")


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    split: Annotated[
        Split, typer.Option(help="Which scenes; unseen has the pairs of shape and color that the others lack.")
    ] = "train",
    count: Annotated[int, typer.Option(help="Number of pictures.")] = 20_000,
    questions: Annotated[int, typer.Option(help="Questions about each picture, at most.")] = 10,
    first: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
) -> None:
    """Write pictures, captions, questions and boxes of the small world."""
    write_dataset(folder, split, count, questions, first)


if __name__ == "__main__":
    typer.run(main)
