"""The demo (`make demo`): the small models answer questions about new pictures.

    python -m small_world.demo [FOLDER]

The pictures are drawn into FOLDER (`demo-output` by default). MG-LLaVA finds boxes itself, and answers with them and
without. FOLDER/answers.png shows some of the answers, FOLDER/accuracy.json lists all of them. SliME reads small print,
with tiles and without. FOLDER/kept.png shows which parts of the tiles its language model saw. The video model says
what happens in a video (FOLDER/videos.png), and guesses when it sees one frame only.
"""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging

from mgllava.chat import ChatSession
from mgllava.noise import hide_noise
from mgllava.visualization import kept_tokens

from . import video_evaluation
from .answer_picture import draw_answers, draw_sheet
from .dataset import write_dataset
from .evaluation import (
    Answer,
    accuracy_table,
    answer_questions,
    detect_boxes,
    load_model,
    read_questions,
    write_answers,
)
from .video_dataset import write_videos

MODEL = Path(__file__).parent / "model"
SLIME = Path(__file__).parent / "slime_model"
# No training or test uses these seeds.
_FIRST_SEED = 1_000_000
_QUESTIONS_PER_PICTURE = 4
# The drawing shows the first pictures that have more boxes than _FEW and fewer than _MANY.
_DRAWN, _FEW, _MANY = 3, 3, 10
# These answers depend on boxes most, because the small low-resolution tower hardly resolves shapes and characters.
_COMPARED_KINDS, _COMPARED = ("shape", "reading"), 8
# Pictures with small print for each other picture, and the fewest.
_SMALL_PRINT_SHARE, _FEWEST_SMALL_PRINT = 0.1, 4
_VIDEOS = 1


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("demo-output"),
    model: Annotated[Path, typer.Option(help="Folder of a model with its processor.")] = MODEL,
    pictures: Annotated[int, typer.Option(help="Number of new pictures.")] = 200,
) -> None:
    """Draw new pictures, find the boxes, answer questions with and without them, read small print, watch videos."""
    hide_noise()
    logging.disable_progress_bar()
    console = Console(highlight=False)
    console.rule("1. Load the model")
    loaded, processor = load_model(model)
    console.print(f"  {type(loaded).__name__}, {loaded.num_parameters():,} parameters, {type(processor).__name__}")

    console.rule(f"2. Draw {pictures} new pictures")
    write_dataset(folder / "pictures", "test", pictures, questions=_QUESTIONS_PER_PICTURE, first=_FIRST_SEED)
    questions, images = read_questions(folder / "pictures"), folder / "pictures" / "images"

    console.rule("3. Find the boxes, answer questions")
    boxes = detect_boxes(processor, questions, images)
    answers, without = (
        list(track(answer_questions(loaded, processor, questions, images, given), text, total=len(questions)))
        for given, text in ((boxes, "With boxes"), ({key: [] for key in boxes}, "Without boxes"))
    )
    console.print(_comparison(answers, without))
    console.print(accuracy_table(f"{pictures} new pictures", {"with boxes": answers, "without boxes": without}))

    session = ChatSession(loaded, processor)
    ids = {row["image"]: row["image_id"] for row in questions}
    given = ((image, session.add_image(images / image, boxes[key]).objects) for image, key in ids.items())
    objects = dict(islice((pair for pair in given if _FEW < len(pair[1]["boxes"]) < _MANY), _DRAWN))
    drawn = [answer for answer in answers if answer.image in objects]
    draw_answers(drawn, objects, images).save(folder / "answers.png")
    write_answers(folder / "accuracy.json", answers)
    console.print(f"Pictures with boxes and answers: {folder / 'answers.png'}")

    console.rule("4. Read small print with SliME")
    _read_small_print(folder, max(_FEWEST_SMALL_PRINT, round(_SMALL_PRINT_SHARE * pictures)), console)

    console.rule("5. Say what happens in a video")
    _watch_videos(folder, console)


def _read_small_print(folder: Path, pictures: int, console: Console) -> None:
    """Let SliME read small print with tiles and without, and draw which tokens of the tiles it kept."""
    loaded, processor = load_model(SLIME)
    console.print(f"  {type(loaded).__name__}, {loaded.num_parameters():,} parameters, {type(processor).__name__}")
    data = folder / "small-print"
    write_dataset(data, "fine-test", pictures, questions=_QUESTIONS_PER_PICTURE, first=_FIRST_SEED)
    questions, images = read_questions(data), data / "images"
    questions = [question for question in questions if question["kind"] == "reading"]
    answers = {}
    for branch, title in (("both", "with tiles"), ("global", "global view only")):
        loaded.config.branch = branch
        answers[title] = list(answer_questions(loaded, processor, questions, images, None))
    loaded.config.branch = "both"
    console.print(accuracy_table("Reading small print", answers))
    drawn, shown = {}, []
    for question, answer in zip(questions, answers["with tiles"], strict=True):
        if question["image"] in drawn or len(drawn) == _DRAWN:
            continue
        picture = Image.open(images / question["image"])
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question["text"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(loaded.device)
        outputs = loaded.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
        drawn[question["image"]] = kept_tokens(picture, outputs)
        shown.append(answer)
    draw_sheet(drawn, shown).save(folder / "kept.png")
    console.print(f"Pictures with the parts of tiles that the language model saw: {folder / 'kept.png'}")


def _watch_videos(folder: Path, console: Console) -> None:
    """Let the video model answer questions about videos, from all frames and from the first one only."""
    loaded, processor = load_model(video_evaluation.MODEL)
    console.print(f"  {type(loaded).__name__}, {loaded.num_parameters():,} parameters, {type(processor).__name__}")
    data = folder / "videos"
    write_videos(data, "test", _VIDEOS, first=_FIRST_SEED)
    videos = video_evaluation.read_video_questions(data)
    answers, of_one = (
        list(video_evaluation.answer_video_questions(loaded, processor, data, videos, video_evaluation.ROWS[name]))
        for name in (video_evaluation.ALL, video_evaluation.FIRST)
    )
    table = Table(title="A new video")
    for column in ("video", "question", "right answer", "8 frames", "first frame only"):
        table.add_column(column)
    for pair in zip(answers, of_one, strict=True):
        table.add_row(pair[0].image, pair[0].question, pair[0].expected, *map(_marked, pair))
    console.print(table)
    video_evaluation.draw_videos(processor, data, answers).save(folder / "videos.png")
    console.print(f"Video with boxes and answers: {folder / 'videos.png'}")


def _marked(answer: Answer) -> str:
    return answer.answer if answer.is_right else f"[red]{answer.answer} (wrong)[/red]"


def _comparison(answers: list[Answer], without: list[Answer]) -> Table:
    """Return a table of the first questions about shapes and characters whose answers depend on boxes."""
    table = Table(title="Shapes and characters: the first questions that are answered differently without boxes")
    for column in ("picture", "question", "right answer", "with boxes", "without boxes"):
        table.add_column(column)
    pairs = (
        (a, b) for a, b in zip(answers, without, strict=True) if a.kind in _COMPARED_KINDS and a.answer != b.answer
    )
    for pair in islice(pairs, _COMPARED):
        table.add_row(pair[0].image, pair[0].question, pair[0].expected, *map(_marked, pair))
    return table


if __name__ == "__main__":
    typer.run(main)
