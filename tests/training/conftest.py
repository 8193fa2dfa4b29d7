"""A tiny repository with the words of the golden set, and samples of a small world for it."""

import json

import pytest
from PIL import Image, ImageDraw

from mgllava import MGLlavaImageProcessor, MGLlavaProcessor
from mgllava.box_files import write_boxes
from mgllava.model_files.vocabulary import load_tokenizer
from mgllava.processing import CHAT_TEMPLATES
from tests.golden_cases import GOLDEN, IMAGE_ID, VOCAB_SIZE
from tests.tiny import IMAGE_SIZE, NUM_FUSED_TOKENS, tiny_model


@pytest.fixture(autouse=True)
def undrawn_losses(monkeypatch):
    """Leave an empty picture of the loss: drawing takes longer than these trainings, and has a test of its own."""
    monkeypatch.setattr("mgllava.training.run.plot_losses", lambda history, path: path.touch())


COLORS = ("red", "green", "blue")


def tiny_processor(template="vicuna"):
    return MGLlavaProcessor(
        image_processor=MGLlavaImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=load_tokenizer(GOLDEN / "llm"),
        image_seq_length=NUM_FUSED_TOKENS,
        chat_template=CHAT_TEMPLATES[template],
    )


def words_model(**kwargs):
    sizes = {"vocab_size": 448, "max_position_embeddings": 2048}
    return tiny_model(text_config=sizes, image_token_id=IMAGE_ID, unpadded_vocab_size=VOCAB_SIZE, **kwargs)


@pytest.fixture(scope="session")
def small_processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def small_repository(tmp_path_factory, small_processor):
    folder = tmp_path_factory.mktemp("small") / "model"
    words_model().save_pretrained(folder)
    small_processor.save_pretrained(folder)
    return folder


def write_samples(folder, count=12, text_every=4, boxes="boxes.json"):
    """Pictures of one square each, a question about its color, and its box; some samples are text alone."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples, records = [], []
    for number in range(count):
        color = COLORS[number % 3]
        name = f"sample-{number}"
        answer = f"It is {color}." + " Very much so." * (number % 4)
        if text_every and number % text_every == text_every - 1:
            turns = [{"from": "human", "value": f"Say {color}."}, {"from": "gpt", "value": answer}]
            samples.append({"id": name, "conversations": turns})
            continue
        box = [5 + number, 10, 40 + number, 30]
        picture = Image.new("RGB", (90, 60), "white")
        ImageDraw.Draw(picture).rectangle(box, fill=color)
        picture.save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "What color is it?\n<image>"}, {"from": "gpt", "value": answer}]
        samples.append({"id": name, "image": f"{number}.png", "conversations": turns})
        records.append({"id": name, "boxes": [box], "labels": ["square"], "scores": [0.9]})
    (folder / "samples.json").write_text(json.dumps(samples))
    write_boxes(folder / boxes, records)
    return samples


@pytest.fixture(scope="session")
def samples_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    return folder


CPU_RECIPE = """\
extends: stage_2.yaml
model: {{name: {repository}, dtype: float32}}
data:
  samples: {samples}/samples.json
  images: {samples}/images
  boxes: {samples}/boxes.json
  allow_other_boxes: true
global_batch_size: 4
training:
  output_dir: {output}
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  bf16: false
  use_cpu: true
  gradient_checkpointing: false
  logging_steps: 1
  save_steps: 2
  num_train_epochs: 2
  dataloader_num_workers: 0
  dataloader_persistent_workers: false
  disable_tqdm: true
"""


@pytest.fixture
def cpu_recipe(tmp_path, small_repository, samples_folder):
    """Path of a recipe of six steps, two epochs of three, that writes to `tmp_path / "out"`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(CPU_RECIPE.format(repository=small_repository, samples=samples_folder, output=tmp_path / "out"))
    return path


def losses(output):
    """Loss of every step, from what a training has left."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
