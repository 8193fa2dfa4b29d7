"""The main job, end to end: the small model answers questions about pictures that nobody has seen (`make demo`).

    python -m small_world.demo [FOLDER]

Pictures are drawn into FOLDER, `demo-output` by default; the model finds the boxes itself. FOLDER/answers.png shows
some of the answers, FOLDER/accuracy.json has all of them.
"""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from mgllava.chat import ChatSession

from .answer_picture import draw_answers
from .dataset import write_dataset
from .evaluation import accuracy_table, answer_questions, detect_boxes, load_model, read_questions, write_answers

MODEL = Path(__file__).parent / "model"
# Seeds that no training and no test used.
_FIRST_SEED = 1_000_000
# About each picture.
_QUESTIONS = 4
# Answers are shown of the first pictures with something to see and room to see it: their number, and numbers of boxes.
_SHOWN, _FEW, _MANY = 3, 3, 10


def main(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("demo-output"),
    model: Annotated[Path, typer.Option(help="Folder of a model with its processor.")] = MODEL,
    pictures: Annotated[int, typer.Option(help="Number of new pictures.")] = 200,
) -> None:
    """Draw new pictures, find their boxes, answer questions about them and count what is right."""
    console = Console()
    console.rule("1. Load the model")
    loaded, processor = load_model(model)
    console.print(f"  {type(loaded).__name__}, {loaded.num_parameters():,} parameters, {type(processor).__name__}")

    console.rule(f"2. Draw {pictures} new pictures")
    write_dataset(folder / "pictures", "test", pictures, questions=_QUESTIONS, first=_FIRST_SEED)
    questions, images = read_questions(folder / "pictures"), folder / "pictures" / "images"

    console.rule("3. Find their boxes, answer questions about them")
    boxes = detect_boxes(processor, questions, images)
    answering = answer_questions(loaded, processor, questions, images, boxes)
    answers = list(track(answering, "Answering", total=len(questions)))
    session = ChatSession(loaded, processor)
    ids = {row["image"]: row["image_id"] for row in questions}
    given = ((image, session.add_image(images / image, boxes[key]).objects) for image, key in ids.items())
    objects = dict(islice((pair for pair in given if _FEW < len(pair[1]["boxes"]) < _MANY), _SHOWN))
    some = [answer for answer in answers if answer.image in objects]
    draw_answers(some, objects, images).save(folder / "answers.png")
    for answer in some:
        console.print(f"  {answer.image}  {answer.question}  [bold]{answer.answer}[/bold]", highlight=False)

    console.print(accuracy_table(answers, f"{pictures} new pictures"))
    write_answers(folder / "accuracy.json", answers)
    console.print(f"Pictures with boxes and answers: {folder / 'answers.png'}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
