"""A tiny model with the vocabulary of the golden set, samples for it, a recipe, and trainers."""

import json

import pytest
from PIL import Image, ImageDraw
from transformers import AutoModel, Trainer, TrainingArguments

from mgllava import MGLlavaImageProcessor, MGLlavaProcessor, MGLlavaVideoProcessor
from mgllava.box_files import write_boxes
from mgllava.model_files.vocabulary import load_tokenizer
from mgllava.processing import CHAT_TEMPLATES
from mgllava.processing.text_chunks_common import IMAGE_TOKEN, VIDEO_TOKEN
from mgllava.training import ConversationDataset, MGLlavaDataCollator, load_recipe, open_source, train
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


def tiny_video_processor(num_frames=3):
    """A processor whose tokenizer has the placeholder of videos."""
    processor = tiny_processor()
    tokenizer = load_tokenizer(GOLDEN / "llm", placeholders=(IMAGE_TOKEN, VIDEO_TOKEN))
    sizes = {name: dict(getattr(processor.image_processor, name)) for name in ("size", "crop_size")}
    sizes = {name: {side: pixels for side, pixels in size.items() if pixels} for name, size in sizes.items()}
    return MGLlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        video_processor=MGLlavaVideoProcessor(**sizes, low_res_size=42, num_frames=num_frames),
        image_seq_length=NUM_FUSED_TOKENS,
        chat_template=CHAT_TEMPLATES["vicuna"],
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
    """Write images of one square each, with a question about its color and its box; some samples are text only."""
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
    """Return the path of a recipe with two epochs of three steps, whose output is `tmp_path / "out"`."""
    path = tmp_path / "recipe.yaml"
    path.write_text(CPU_RECIPE.format(repository=small_repository, samples=samples_folder, output=tmp_path / "out"))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_repository, samples_folder):
    """Return the output folder of a finished training with the settings of `cpu_recipe`; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = CPU_RECIPE.format(repository=small_repository, samples=samples_folder, output=folder / "out")
    (folder / "recipe.yaml").write_text(recipe)
    return train(load_recipe(folder / "recipe.yaml"))


@pytest.fixture
def make_trainer(small_repository, small_processor, samples_folder, tmp_path):
    """Return a function that builds a trainer of the small model with the package's dataset and collator."""

    def make(
        dataset=None,
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        on_bad_sample="error",
        trainer_options=(),
        **arguments,
    ):
        if dataset is None:
            files = [samples_folder / name for name in ("samples.json", "images", "boxes.json")]
            dataset = ConversationDataset([open_source(*files)], small_processor)
        defaults = {
            "output_dir": str(tmp_path / "trainer"),
            "remove_unused_columns": False,
            "use_cpu": True,
            "bf16": False,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return trainer_class(
            AutoModel.from_pretrained(small_repository),
            arguments_class(**{**defaults, **arguments}),
            train_dataset=dataset,
            data_collator=MGLlavaDataCollator(small_processor, on_bad_sample=on_bad_sample),
            processing_class=small_processor,
            **dict(trainer_options),
        )

    return make


def losses(output):
    """Return the loss of every step from the state that a training has saved."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
