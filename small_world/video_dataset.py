"""Write a data set of videos of the small world: lossless files, Video-LLaVA's samples, box files of frames.

    python -m small_world.video_dataset small-video/train --count 6000
    python -m small_world.video_dataset small-video/test --split test --count 400

The folder contains `videos/*.webp` (animations without loss), `conversations.json` (training), `questions.jsonl` (the
questions one by one with their kind: evaluation) and `boxes.json` (the true boxes of the frames). With
`--few-frames N` there are also `boxes-N.json`, the boxes of N frames, and `conversations-N.json`, without questions
about order, for the first lesson. Existing videos are kept, so an interrupted run can be resumed.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from mgllava.atomic_files import replacing
from mgllava.box_files import write_boxes

from .dataset import write_json
from .drawing import draw_frames
from .videos import VideoSplit, make_video

_MILLISECONDS = 250


def make_sample(split: VideoSplit, number: int, videos: Path) -> dict[str, Any]:
    """Draw a video, write it into `videos` unless it exists, and return all that is known about it."""
    video = make_video(split, number)
    frames = draw_frames(video.frames)
    path = videos / f"{number:06d}.webp"
    if not path.exists():
        pictures: list[Image.Image] = [picture for picture, _ in frames]
        # Not `replacing`, which waits for the disk for each of thousands of files.
        unfinished = path.with_suffix(".part")
        pictures[0].save(
            unfinished,
            format="WEBP",
            save_all=True,
            append_images=pictures[1:],
            duration=_MILLISECONDS,
            lossless=True,
            method=0,
            quality=0,
        )
        unfinished.rename(path)
    return {
        "id": video.id,
        "video": path.name,
        "questions": [vars(question) for question in video.questions],
        "frames": [
            {
                "boxes": boxes,
                "labels": [item.shape for item in scene.objects],
                "scores": [1.0] * len(boxes),
                "width": scene.width,
                "height": scene.height,
            }
            for scene, (_, boxes) in zip(video.frames, frames, strict=True)
        ],
    }


def write_videos(
    folder: Path,
    split: VideoSplit,
    count: int,
    first: int = 0,
    few_frames: int | None = None,
    processes: int | None = None,
) -> None:
    """Write a data set of `count` videos; `first` is the first video's seed. Existing text files are replaced.

    `few_frames` also writes the boxes of so many frames, evenly sampled, and the questions that they can answer.
    """
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        done = pool.map(partial(make_sample, split, videos=videos), range(first, first + count), chunksize=20)
        samples = list(track(done, f"Drawing {folder}", total=count))
    write_json(folder / "conversations.json", [_conversation(sample, sample["questions"]) for sample in samples])
    with replacing(folder / "questions.jsonl") as path, path.open("w", encoding="utf-8") as file:
        for sample in samples:
            for number, question in enumerate(sample["questions"]):
                row = {"question_id": f"{sample['id']}/{number}", "video_id": sample["id"], "video": sample["video"]}
                file.write(json.dumps({**row, **question}) + "\n")
    write_boxes(folder / "boxes.json", [_boxes(sample, len(sample["frames"])) for sample in samples])
    if few_frames is not None:
        write_boxes(folder / f"boxes-{few_frames}.json", [_boxes(sample, few_frames) for sample in samples])
        kept = [[q for q in sample["questions"] if not q["kind"].endswith("appearance")] for sample in samples]
        rows = [_conversation(sample, questions) for sample, questions in zip(samples, kept, strict=True)]
        write_json(folder / f"conversations-{few_frames}.json", rows)


def _boxes(sample: dict[str, Any], num_frames: int) -> dict[str, Any]:
    """Return a record of a box file, with the frames that the processor samples."""
    indices = np.linspace(0, len(sample["frames"]) - 1, num_frames).astype(int)
    frames = [sample["frames"][index] for index in indices]
    return {"id": sample["id"], "video": sample["video"], "frames": frames}


def _conversation(sample: dict[str, Any], questions: list[dict[str, str]]) -> dict[str, Any]:
    """Return a sample in Video-LLaVA's format, with the video before the first question."""
    messages = []
    for number, question in enumerate(questions):
        prefix = "<video>\n" if number == 0 else ""
        messages += [
            {"from": "human", "value": prefix + question["text"]},
            {"from": "gpt", "value": question["answer"]},
        ]
    return {"id": sample["id"], "video": sample["video"], "conversations": messages}


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    split: Annotated[VideoSplit, typer.Option(help="Which videos; none is in both.")] = "train",
    count: Annotated[int, typer.Option(help="Number of videos.")] = 6000,
    first: Annotated[int, typer.Option(help="Seed of the first video.")] = 0,
    few_frames: Annotated[int | None, typer.Option(help="Also write boxes of so many frames.")] = None,
) -> None:
    """Write videos, questions and boxes of the small world."""
    write_videos(folder, split, count, first, few_frames)


if __name__ == "__main__":
    typer.run(main)
