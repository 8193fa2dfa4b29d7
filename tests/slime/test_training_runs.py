"""Training by recipes: all stages one after the other, adapters, several processes."""

import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from mgllava.processing import SLIME_CHAT_TEMPLATES
from mgllava.training import MGLlavaDataCollator, MGLlavaTrainer, TrainingError, load_recipe, lora_config, train
from tests.training.conftest import losses, write_samples
from tests.training.test_distributed import launch
from tests.training.test_train import changed_tensors

CPU_RECIPE = """\
extends: {stage}.yaml
model: {{name: {model}, dtype: float32}}
data:
  samples: {samples}/samples.json
  images: {samples}/images
global_batch_size: 4
training:
  output_dir: {output}
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  lr_scheduler_type: constant
  train_sampling_strategy: sequential
  bf16: false
  use_cpu: true
  gradient_checkpointing: false
  logging_steps: 1
  save_strategy: no
  dataloader_num_workers: 0
  dataloader_persistent_workers: false
  disable_tqdm: true
"""


@pytest.fixture(scope="module")
def slime_samples(tmp_path_factory):
    """Twelve samples, every fourth without an image."""
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, slime_folder, slime_samples):
    """Write the recipe of a stage for CPUs."""

    def write(stage, model=slime_folder):
        path = tmp_path / f"cpu_{stage}.yaml"
        values = {"stage": stage, "model": model, "samples": slime_samples, "output": tmp_path / f"out-{stage}"}
        path.write_text(CPU_RECIPE.format(**values))
        return path

    return write


STAGES = {
    "slime_stage_1a": {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"},
    "slime_stage_1b": {"multi_modal_projector.query_adapter"},
    "slime_stage_2": {"local_compressor"},
    "slime_stage_3": {"multi_modal_projector", "local_compressor", "language_model", "lm_head"},
}


def test_the_stages_one_after_the_other(recipe, slime_folder, capfd):
    model = slime_folder
    for stage, trained in STAGES.items():
        output = train(load_recipe(recipe(stage, model)))
        changed = {name.removeprefix("model.") for name in changed_tensors(model, output)}
        found = {part for part in trained if any(name == part or name.startswith(f"{part}.") for name in changed)}
        assert found == trained, stage
        assert all(name.startswith(tuple(trained)) for name in changed), stage
        assert not any("positions" in name for name in changed)
        assert ("multi_modal_projector.gate" in changed) == (stage == "slime_stage_3")
        # What a stage sets is saved with its result, and the next one sets it again.
        values = load_recipe(f"{stage}.yaml").model.config
        config = AutoConfig.from_pretrained(output)
        assert {name: getattr(config, name) for name in values} == values
        assert f"saved with the result: branch={values['branch']}" in " ".join(capfd.readouterr().err.split())
        assert AutoProcessor.from_pretrained(output).chat_template == SLIME_CHAT_TEMPLATES["v1"]
        assert min(losses(output).values()) < losses(output)[1]
        model = output


def test_adapters_are_saved_loaded_and_merged(recipe, slime_folder, tmp_path):
    path = recipe("slime_stage_3")
    rates = ("learning_rates.multi_modal_projector=1e-6", "learning_rates.local_compressor=2e-2")
    output = train(load_recipe(path, "slime_lora.yaml", *rates, "training.learning_rate=1e-2", "lora.r=4"))
    saved = load_file(output / "adapter_model.safetensors")
    kinds = {name.split(".")[-3] for name in saved if ".lora_A." in name}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("lm_head" in name or "vision_tower" in name for name in saved)
    before = load_file(slime_folder / "model.safetensors")
    changes = {}
    for part in ("multi_modal_projector.linear_1.weight", "local_compressor.q_proj.weight"):
        now = next(value for name, value in saved.items() if name.endswith(part))
        changes[part] = (now - before[f"model.{part}"]).abs().max().item()
    # Each with a learning rate of its own: Adam moves a weight by about that in a step, and there were three.
    assert changes["multi_modal_projector.linear_1.weight"] < 1e-5
    assert 1e-2 < changes["local_compressor.q_proj.weight"] < 0.1

    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(slime_folder), output).eval()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(output).save_pretrained(tmp_path / "merged")
    again = AutoModel.from_pretrained(tmp_path / "merged").eval()
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(slime_folder), output).eval()
    picture, prompt = Image.new("RGB", (90, 60), "red"), "USER: <image>\nWhat? ASSISTANT:"
    inputs = AutoProcessor.from_pretrained(tmp_path / "merged")(picture, prompt, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_the_projector_is_trained_whole_by_adapters(slime_folder):
    config = lora_config(AutoModel.from_pretrained(slime_folder), r=2)
    assert set(config.modules_to_save) == {"multi_modal_projector", "local_compressor"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("data.prompt_template=vicuna", "`data.prompt_template` must be null or a template of SliME .*'vicuna'"),
        ("learning_rates.vision_tower=1e-5", r"`learning_rates\.vision_tower` matches no parameter that is trained"),
        ("data.boxes=boxes.json", "SliME takes no boxes"),
        ("model.config.branch=tiles", "`model.config` cannot be used"),
        ("model.config.num_local_queries=16", "`model.config` does not fit the weights"),
    ],
)
def test_settings_that_do_not_fit_are_named(recipe, change, problem):
    with pytest.raises(TrainingError, match=problem):
        train(load_recipe(recipe("slime_stage_3"), change))


def test_lost_labels_are_counted(recipe, slime_samples, tmp_path, caplog):
    rows = json.loads((slime_samples / "samples.json").read_text())
    for row in rows[::3]:
        row["conversations"][1]["value"] = "It is </s> red."
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    changes = (f"data.samples={tmp_path / 'samples.json'}", "data.original_labels=true", "training.logging_steps=2")
    output = train(load_recipe(recipe("slime_stage_3"), *changes))
    assert "Nothing was learned from 4 samples, whose labels the original loses" in caplog.text
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert history[0]["lost_samples"] == 3


def test_samples_of_all_kinds_share_a_batch(slime_folder):
    """Several images, text alone, and one image: the loss is the mean over all learned tokens."""
    model, processor = AutoModel.from_pretrained(slime_folder).eval(), AutoProcessor.from_pretrained(slime_folder)
    images = [Image.new("RGB", size, color) for size, color in (((90, 60), "red"), ((40, 130), "blue"))]

    def sample(images, answer):
        question = {"from": "human", "value": "<image>" * len(images) + "What is it?"}
        return {"id": answer, "image": images, "conversations": [question, {"from": "gpt", "value": answer}]}

    samples = [sample(images, "It is red and blue."), sample([], "Nothing."), sample(images[1:], "Blue.")]
    collator = MGLlavaDataCollator(processor)
    batch = collator(samples)
    assert len(batch["image_grids"]) == 3 and len(batch["pixel_values"]) == 3 + int(batch["image_grids"].prod(1).sum())
    with torch.no_grad():
        counts = [int((collator([one])["labels"] != -100).sum()) for one in samples]
        losses = [model(**collator([one])).loss.item() for one in samples]
        mean = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
        assert model(**batch).loss.item() == pytest.approx(mean, abs=1e-5)


def test_sharding_sees_no_saved_buffers(slime_folder, monkeypatch):
    """accelerate takes all that is saved for shards; the slow test below trains with it."""
    model = AutoModel.from_pretrained(slime_folder)
    before = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()} & before.keys()
    assert "model.local_compressor.positions" in buffers
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append((tensor, src)))

    def prepare(given, optimizer):
        assert given is model and not buffers & model.state_dict().keys()
        return given, optimizer

    assert MGLlavaTrainer._prepare_sharded(None, prepare, model, "optimizer") == (model, "optimizer")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert len(sent) == len(buffers) and all(src == 0 for _, src in sent)
    assert all(torch.equal(after[name], before[name]) for name in buffers)


SHORT = ("training.per_device_train_batch_size=1", "training.max_steps=2")
GROUPS = [
    pytest.param("fsdp2", "slime_stage_3", (), marks=pytest.mark.slow),
    # Trained modules that the configuration does not use: DistributedDataParallel waits for their gradients.
    pytest.param(
        "ddp",
        "slime_stage_3",
        ("model.config.branch=global", "model.config.forced_expert=0"),
        marks=pytest.mark.slow,
    ),
    pytest.param("ddp", "slime_stage_1a", (), marks=pytest.mark.slow),
    pytest.param("ddp", "slime_stage_2", (), marks=pytest.mark.slow),
    pytest.param("fsdp2", "slime_stage_1b", (), marks=pytest.mark.slow),
    pytest.param("fsdp2", "slime_stage_2", (), marks=pytest.mark.slow),
    pytest.param("zero2", "slime_stage_1b", (), marks=pytest.mark.slow),
    pytest.param("zero2", "slime_stage_3", ("model.config.forced_expert=1",), marks=pytest.mark.slow),
    pytest.param("zero3", "slime_stage_2", (), marks=pytest.mark.slow),
    pytest.param("zero3", "slime_stage_3", ("slime_lora.yaml", "lora.r=4"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "stage", "changes"), GROUPS)
def test_two_processes_learn_what_one_does(recipe, slime_folder, tmp_path, kind, stage, changes):
    """Also where the batch of one of them is text alone. The noise of stage III differs between processes."""
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    path = recipe(stage)
    expected = losses(train(load_recipe(path, *changes, *SHORT)))
    found, _ = launch(kind, path, tmp_path / "two", *changes, *SHORT)
    has_noise = stage == "slime_stage_3" and not changes
    assert found == pytest.approx(expected, abs=0.5 if has_noise or "slime_lora.yaml" in changes else 2e-4)
    if kind == "fsdp2":
        # accelerate shards all that is saved, and fails for these.
        before, after = (load_file(folder / "model.safetensors") for folder in (slime_folder, tmp_path / "two"))
        assert before.keys() == after.keys()
        assert torch.equal(before["model.local_compressor.positions"], after["model.local_compressor.positions"])
