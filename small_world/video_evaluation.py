"""Measure the share of questions about new videos that a model answers right, with all frames and with less.

    python -m small_world.video_evaluation small_world/video_model --data small-video/test

Each row asks the same model the same questions: with all frames and true boxes; with one of the frames, eight times or
once; with gray frames, so that it can only guess; with the boxes that the detector of `small_world/model` finds; and
without boxes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor

from mgllava.atomic_files import replacing
from mgllava.box_files import read_boxes
from mgllava.visualization import draw_frames

from .answer_picture import draw_sheet
from .evaluation import Answer, Boxes, load_model
from .videos import NUM_FRAMES, VIDEO_KINDS

_HERE = Path(__file__).parent
MODEL = _HERE / "video_model"
# The video model has no box detector of its own.
DETECTOR = _HERE / "model"


@dataclass(frozen=True)
class Row:
    """What the model is given: the indices of the frames that it is shown, and the source of the boxes."""

    frames: Sequence[int] = range(NUM_FRAMES)
    boxes: Boxes = Boxes.FILE


ALL, FIRST = "all 8 frames", "first frame, 8 times"
ROWS = {
    ALL: Row(),
    FIRST: Row([0] * NUM_FRAMES),
    "fifth frame, 8 times": Row([NUM_FRAMES // 2] * NUM_FRAMES),
    "last frame, 8 times": Row([NUM_FRAMES - 1] * NUM_FRAMES),
    "first frame, once": Row([0]),
    "no frames, question alone": Row([]),
    "all 8 frames, found boxes": Row(boxes=Boxes.DETECTOR),
    "all 8 frames, no boxes": Row(boxes=Boxes.NONE),
}
_ANSWER_TOKENS = 8
_GRAY = 128
# Videos in the picture.
_DRAWN = 2


def read_video_questions(folder: Path, count: int | None = None) -> dict[str, list[dict[str, str]]]:
    """Read the questions about the first `count` videos of a data set, by the video's id."""
    videos: dict[str, list[dict[str, str]]] = {}
    for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        videos.setdefault(row["video_id"], []).append(row)
    return dict(islice(videos.items(), count))


def answer_video_questions(
    model: Any,
    processor: Any,
    data: Path,
    videos: Mapping[str, list[dict[str, str]]],
    row: Row = ROWS[ALL],
) -> Iterator[Answer]:
    """Answer the questions about videos of a data set, by the video's id, as a row says.

    Without frames, the model is shown as many gray ones, without objects.
    """
    true_boxes = read_boxes(data / "boxes.json")
    for video_id, questions in videos.items():
        frames = read_frames(processor, data / "videos" / questions[0]["video"])
        boxes: Sequence[Any] = [[]] * len(frames)
        if not row.frames:
            frames = np.full_like(frames, _GRAY)
        else:
            frames = frames[list(row.frames)]
            boxes = boxes[: len(frames)]
            if row.boxes is Boxes.FILE:
                boxes = [true_boxes[video_id]["frames"][index] for index in row.frames]
            elif row.boxes is Boxes.DETECTOR:
                [boxes] = processor.detect(videos=[frames], num_frames=len(frames))
        texts = answer_about_video(model, processor, frames, boxes, [question["text"] for question in questions])
        for question, text in zip(questions, texts, strict=True):
            yield Answer(
                question["question_id"],
                question["video"],
                question["kind"],
                question["text"],
                question["answer"],
                text,
            )


def read_frames(processor: Any, video: Path) -> np.ndarray:
    """Return the frames that the processor samples from a video, of shape `(num_frames, height, width, 3)`."""
    [clip] = processor.video_processor.read_clips([str(video)])
    return np.asarray(clip.frames.permute(0, 2, 3, 1))


@torch.inference_mode()
def answer_about_video(
    model: Any, processor: Any, frames: np.ndarray, boxes: Sequence[Any], questions: Sequence[str]
) -> list[str]:
    """Answer questions about one video, `frames` of shape `(num_frames, height, width, 3)`, which is encoded once."""
    inputs = processor(
        text=processor.video_token, videos=[frames], video_boxes=[boxes], num_frames=len(frames), return_tensors="pt"
    ).to(model.device)
    features = model.get_video_features(**{name: inputs[name] for name in processor.video_inputs})
    run = [processor.video_token_id] * len(features.pooler_output[0])
    prompts = []
    for question in questions:
        content = [{"type": "video"}, {"type": "text", "text": question}]
        ids, _ = processor.encode_text([{"role": "user", "content": content}], add_generation_prompt=True)
        place = ids.index(processor.video_token_id)
        prompts.append(torch.tensor([*ids[:place], *run, *ids[place + 1 :]]))
    padded = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left").to(model.device)
    mask = padded >= 0
    repeated = type(features)(pooler_output=list(features.pooler_output) * len(questions))
    generated = model.generate(
        input_ids=padded.where(mask, processor.tokenizer.pad_token_id),
        attention_mask=mask.long(),
        mm_encoder_outputs={"video": repeated},
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
    )
    answers = processor.batch_decode(generated[:, padded.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def shares(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the share of right answers for each kind of question, and for all (`all`)."""
    kinds = {kind: [a.is_right for a in answers if a.kind == kind] for kind in VIDEO_KINDS}
    kinds["all"] = [a.is_right for a in answers]
    return {kind: sum(right) / len(right) for kind, right in kinds.items() if right}


def summarize(rows: dict[str, dict[str, float]], asked: dict[str, int]) -> Table:
    """Return a table of right answers in percent, with standard errors, from the shares of the rows."""
    table = Table(title="right answers, %")
    for column in ("row", *asked):
        table.add_column(column, justify="left" if column == "row" else "right")
    for name, row in rows.items():
        errors = {kind: (row[kind] * (1 - row[kind]) / asked[kind]) ** 0.5 for kind in asked}
        table.add_row(name, *(f"{100 * row[kind]:.1f} ± {100 * errors[kind]:.1f}" for kind in asked))
    return table


def draw_videos(processor: Any, data: Path, answers: Sequence[Answer], width: int = 760) -> Image.Image:
    """Draw the frames of videos with their true boxes, and the questions and answers about them."""
    boxes = read_boxes(data / "boxes.json")
    ids = {answer.image: answer.question_id.rpartition("/")[0] for answer in answers}
    drawn = {
        name: draw_frames(read_frames(processor, data / "videos" / name), boxes[key], scores=False)
        for name, key in ids.items()
    }
    return draw_sheet(drawn, answers, width)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a model with its processor.")] = MODEL,
    data: Annotated[Path, typer.Option(help="Data set, see small_world.video_dataset.")] = Path("small-video/test"),
    count: Annotated[int | None, typer.Option(help="Number of videos; all by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Rows to ask: {', '.join(ROWS)}; all by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Image file for some videos with answers.")] = None,
) -> None:
    """Ask a model about new videos, and print the share of right answers."""
    loaded, processor = load_model(model)
    videos = read_video_questions(data, count)
    rows: dict[str, dict[str, float]] = {}
    asked: dict[str, int] = {}
    for name in only or ROWS:
        if ROWS[name].boxes is Boxes.DETECTOR:
            processor.box_detector = AutoProcessor.from_pretrained(DETECTOR).box_detector
        found = answer_video_questions(loaded, processor, data, videos, ROWS[name])
        answers = list(track(found, name, total=sum(map(len, videos.values()))))
        rows[name] = shares(answers)
        asked = {kind: sum(kind in (a.kind, "all") for a in answers) for kind in rows[name]}
        typer.echo(f"{name}: {rows[name]}")
        if output is not None:
            output.parent.mkdir(exist_ok=True)
            with replacing(output) as partial:
                result = {"videos": len(videos), "questions": asked, "rows": rows}
                partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if name == ALL and picture is not None:
            drawn = list(dict.fromkeys(answer.image for answer in answers))[:_DRAWN]
            draw_videos(processor, data, [answer for answer in answers if answer.image in drawn]).save(picture)
    Console().print(summarize(rows, asked))


if __name__ == "__main__":
    typer.run(main)
