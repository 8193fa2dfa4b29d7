"""Measure the share of questions about new pictures that a model answers right.

    python -m small_world.evaluation small-world/stage-2 --data small-world/test --boxes detector

`--boxes` is `detector` (that of the model), `file` (`--box-file`, or the true boxes of the data set) or `none`. An
answer is right if it matches the reference answer; case and surrounding spaces are ignored.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModel, AutoProcessor

import mgllava
from mgllava.atomic_files import replacing
from mgllava.box_files import read_boxes
from mgllava.families import takes_boxes

from .questions import KINDS

# Answers have at most two words of a few tokens.
_ANSWER_TOKENS = 8


class Boxes(str, Enum):
    """Source of the boxes."""

    DETECTOR = "detector"
    FILE = "file"
    NONE = "none"


@dataclass(frozen=True)
class Answer:
    """A question and the model's answer."""

    question_id: str
    image: str
    kind: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the answer matches the reference answer."""
        return self.answer.strip().lower() == self.expected.lower()


def load_model(folder: Path, bits: int | None = None, **config: Any) -> tuple[Any, Any]:
    """Load a model, quantized if `bits` is given, and its processor; `config` replaces values of the configuration."""
    # Half precision is many times slower than float32 on a CPU.
    options = config if bits is None else {"quantization_config": mgllava.quantization_config(bits), **config}
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    model = AutoModel.from_pretrained(folder, dtype=dtype, device_map="auto", **options).eval()
    return model, AutoProcessor.from_pretrained(folder)


def read_questions(folder: Path, count: int | None = None) -> list[dict[str, str]]:
    """Read the questions about the first `count` pictures of a data set.

    Each has the keys `question_id`, `image_id`, `image`, `kind`, `text` and `answer`.
    """
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = set(islice(dict.fromkeys(row["image_id"] for row in rows), count))
    return [row for row in rows if row["image_id"] in kept]


@torch.inference_mode()
def answer_questions(
    model: Any,
    processor: Any,
    questions: Sequence[dict[str, str]],
    images: Path,
    boxes: dict[str, Any] | None,
    batch_size: int = 32,
) -> Iterator[Answer]:
    """Answer questions in their order.

    `boxes` has the boxes by the id of the picture; if it is `None`, the processor's box detector finds them. A
    processor that takes no boxes is given none.
    """
    has_boxes = takes_boxes(processor)
    if boxes is None and has_boxes:
        boxes = detect_boxes(processor, questions, images)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        conversations = []
        for row in batch:
            image = {"type": "image", "image": Image.open(images / row["image"])}
            if boxes is not None and has_boxes:
                image["boxes"] = boxes[row["image_id"]]
            conversations.append([{"role": "user", "content": [image, {"type": "text", "text": row["text"]}]}])
        inputs = _prompts(processor, conversations).to(model.device)
        pictures = [row["image_id"] for row in batch]
        same_as = [pictures.index(picture) for picture in pictures]
        if has_boxes:
            prompts = {"inputs_embeds": embed_prompts(model, inputs, same_as)}
        else:
            once = _prompts(processor, [conversations[index] for index in sorted(set(same_as))]).to(model.device)
            features = _repeated(
                model.get_image_features(**{name: once[name] for name in processor.image_inputs}), same_as
            )
            prompts = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": features}}
        generated = model.generate(
            **prompts, attention_mask=inputs["attention_mask"], max_new_tokens=_ANSWER_TOKENS, do_sample=False
        )
        if not has_boxes:
            generated = generated[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(generated, skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            yield Answer(row["question_id"], row["image"], row["kind"], row["text"], row["answer"], text.strip())


def _prompts(processor: Any, conversations: list[Any]) -> Any:
    """Encode conversations as one batch of prompts."""
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def _repeated(features: Any, same_as: Sequence[int]) -> Any:
    """Return the features of SliME's images once for each prompt; `features` are those of the different pictures."""
    first = sorted(set(same_as))
    order = [first.index(index) for index in same_as]
    tokens = [features.pooler_output[index] for index in order]
    return type(features)(pooler_output=tokens, image_grids=features.image_grids[order])


def embed_prompts(model: Any, inputs: Mapping[str, torch.Tensor], same_as: Sequence[int]) -> torch.Tensor:
    """Return `inputs_embeds` of prompts with one image each; a picture that occurs several times is encoded once.

    `same_as` has for each prompt the index of the first prompt with the same picture and boxes.
    """
    first = sorted(set(same_as))
    images = {name: inputs[name][first] for name in ("pixel_values", "boxes", "num_boxes")}
    tokens = dict(zip(first, model.get_image_features(**images).pooler_output, strict=True))
    features = [tokens[index] for index in same_as]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    mask = model.model.get_placeholder_mask(inputs["input_ids"], embeds, features)
    return embeds.masked_scatter(mask, torch.cat(features).to(embeds.dtype))


def detect_boxes(
    processor: Any, questions: Sequence[dict[str, str]], images: Path, batch_size: int = 16
) -> dict[str, Any]:
    """Return the detected boxes of the pictures of some questions by the picture's id."""
    files = {row["image_id"]: str(images / row["image"]) for row in questions}
    found = processor.detect(list(files.values()), batch_size=batch_size)
    return dict(zip(files, found, strict=True))


def accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the share of right answers for each kind of question, and for all (`all`)."""
    kinds = {kind: [a.is_right for a in answers if a.kind == kind] for kind in KINDS}
    kinds["all"] = [a.is_right for a in answers]
    return {kind: sum(right) / len(right) for kind, right in kinds.items() if right}


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write all answers, and the accuracy, as JSON."""
    result = {"accuracy": accuracy(answers), "answers": [asdict(answer) for answer in answers]}
    with replacing(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def accuracy_table(title: str, columns: Mapping[str, Sequence[Answer]]) -> Table:
    """Return a table with the accuracy of one or several sets of answers to the same questions, by column title."""
    table = Table(title=title)
    for name in ("kind", "questions", *columns):
        table.add_column(name, justify="left" if name == "kind" else "right")
    shares = [accuracy(answers) for answers in columns.values()]
    for kind in shares[0]:
        asked = sum(kind in (answer.kind, "all") for answer in next(iter(columns.values())))
        table.add_row(kind, str(asked), *(f"{100 * share[kind]:.1f} %" for share in shares))
    return table


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a model with its processor.")],
    data: Annotated[Path, typer.Option(help="Data set, see small_world.dataset.")],
    boxes: Annotated[Boxes, typer.Option(help="Source of the boxes.")] = Boxes.DETECTOR,
    box_file: Annotated[Path | None, typer.Option(help="For --boxes file; by default the true boxes.")] = None,
    count: Annotated[int | None, typer.Option(help="Number of pictures; all by default.")] = None,
    bits: Annotated[int | None, typer.Option(help="Quantize the language model to 4 or 8 bits.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for all answers and the accuracy.")] = None,
) -> None:
    """Ask a model about new pictures and print the share of right answers."""
    loaded, processor = load_model(model, bits)
    questions = read_questions(data, count)
    given: dict[str, Any] | None = None
    if boxes is Boxes.FILE:
        records = read_boxes(box_file or data / "boxes.json")
        given = {row["image_id"]: records[row["image_id"]] for row in questions}
    elif boxes is Boxes.NONE:
        given = {row["image_id"]: [] for row in questions}
    answers = list(
        track(
            answer_questions(loaded, processor, questions, data / "images", given), "Answering", total=len(questions)
        )
    )
    console = Console()
    console.print(accuracy_table(f"{model}, boxes: {boxes.value}", {"right": answers}))
    if output is not None:
        write_answers(output, answers)


if __name__ == "__main__":
    typer.run(main)
