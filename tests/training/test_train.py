import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from typer.testing import CliRunner

from mgllava.box_files import BoxFileError
from mgllava.cli import app
from mgllava.training import (
    ConversationDataset,
    MGLlavaDataCollator,
    MGLlavaTrainer,
    SampleError,
    TrainingError,
    load_recipe,
    lora_config,
    open_source,
    train,
)
from mgllava.training.checkpoints import last_complete_checkpoint
from tests import processes
from tests.golden_cases import GOLDEN
from tests.training.conftest import losses, write_samples


def run(recipe, *changes, resume=False):
    return train(load_recipe(recipe, *changes), resume=resume)


def changed_tensors(before, after):
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


STAGES = {"stage_1": ("fusion", "multi_modal_projector", "box_projector")}
STAGES["stage_2"] = (*STAGES["stage_1"], "language_model", "lm_head")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_changes_what_it_declares_and_nothing_else(cpu_recipe, small_repository, stage):
    declared = load_recipe(f"{stage}.yaml").train
    output = run(cpu_recipe, f"train={json.dumps(declared)}")
    changed = changed_tensors(small_repository, output)
    # Rows of words that do not occur stay, so tensors are asked for, not all of their values.
    assert {name.removeprefix("model.").split(".")[0] for name in changed} == set(STAGES[stage])
    assert min(losses(output).values()) < losses(output)[1]


def test_the_result_is_a_repository_with_processor_and_account(cpu_recipe, samples_folder):
    output = run(cpu_recipe)
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    picture = samples_folder / "images" / "0.png"
    inputs = processor(str(picture), "USER: <image>\nWhat? ASSISTANT:", boxes=[[[5, 10, 40, 30]]], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert load_recipe(output / "recipe.yaml") == load_recipe(cpu_recipe)
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 6 and (output / "loss.png").exists()
    logged = state["log_history"][0]
    assert logged["tokens_per_second"] > 0 and "images_per_second" in logged
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]
    assert AutoProcessor.from_pretrained(output / "checkpoint-4").chat_template == processor.chat_template
    assert json.loads((output / "config.json").read_text())["text_config"].get("use_cache", True)


@pytest.mark.parametrize("changes", [(), ("lora.yaml", "lora.lora_dropout=0.3", "training.learning_rate=1e-2")])
def test_a_resumed_training_has_the_losses_of_an_uninterrupted_one(cpu_recipe, changes):
    """From the middle of the first epoch, with shuffled, grouped batches and dropout."""
    output = run(cpu_recipe, "training.save_total_limit=5", *changes)
    whole = losses(output)
    assert len(set(whole.values())) == 6
    for step in (4, 6):
        shutil.rmtree(output / f"checkpoint-{step}")
    (output / "trainer_state.json").unlink()
    run(cpu_recipe, "training.save_total_limit=5", *changes, resume=True)
    assert losses(output) == whole


def test_a_folder_with_checkpoints_is_not_overwritten(cpu_recipe):
    run(cpu_recipe, "training.max_steps=2")
    with pytest.raises(TrainingError, match=r"checkpoint-2.*Pass `resume`"):
        run(cpu_recipe)


KILLED_WHILE_SAVING = """
import os, signal, sys
import mgllava.training.trainer as trainer
from mgllava.training import load_recipe, train

mark_complete = trainer.mark_complete

def killed(checkpoint):
    if checkpoint.name == "checkpoint-4":
        os.truncate(checkpoint / "optimizer.pt", 100)
        os.kill(os.getpid(), signal.SIGKILL)
    mark_complete(checkpoint)

trainer.mark_complete = killed
train(load_recipe(sys.argv[1], "training.save_total_limit=1"))
"""


def test_a_save_that_was_killed_is_not_resumed_from(cpu_recipe, tmp_path):
    # Another number of threads would add up in another order.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert processes.run("-c", KILLED_WHILE_SAVING, cpu_recipe, **threads) == -signal.SIGKILL
    output = tmp_path / "out"
    # With one checkpoint to keep, the older one is still there.
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert last_complete_checkpoint(output) == output / "checkpoint-2"

    run(cpu_recipe, "training.save_total_limit=1", resume=True)
    resumed = losses(output)
    shutil.rmtree(output)
    assert resumed == losses(run(cpu_recipe))
    assert last_complete_checkpoint(output) == output / "checkpoint-6"


@pytest.mark.slow
def test_killed_at_random_moments_and_with_a_full_disk_the_training_is_the_same(cpu_recipe, tmp_path):
    """Ten interruptions: kills while loading, learning and saving, and writes that the disk takes in part."""
    changes = ["training.save_steps=1", "training.save_total_limit=2", "training.num_train_epochs=4"]
    expected = losses(run(cpu_recipe, *changes, f"training.output_dir={tmp_path / 'undisturbed'}"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (%d, %d)); "
    code = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from mgllava.training import load_recipe, train; train(load_recipe(*sys.argv[1:]), resume=True)"
    )
    generator, output = random.Random(0), tmp_path / "out"
    for number in range(10):
        is_full = number % 3 == 2
        size = generator.randrange(50_000, 400_000)
        command = [sys.executable, "-c", (limited % (size, size) if is_full else "") + code, str(cpu_recipe), *changes]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            process.wait(120 if is_full else generator.uniform(6, 12))
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait(60)
        whole = last_complete_checkpoint(output) if output.exists() else None
        if whole is not None:  # it can be read
            load_file(whole / "model.safetensors")
    if not (output / "model.safetensors").exists():
        run(cpu_recipe, *changes, resume=True)
    assert losses(output) == expected


def test_a_checkpoint_that_was_deleted_in_part_is_skipped(cpu_recipe):
    output = run(cpu_recipe)
    (output / "checkpoint-6" / "optimizer.pt").unlink()
    assert last_complete_checkpoint(output) == output / "checkpoint-4"
    with (output / "checkpoint-4" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert last_complete_checkpoint(output) is None


def test_a_loss_that_is_nan_stops_with_the_ids(cpu_recipe, small_repository, small_processor, tmp_path):
    broken = shutil.copytree(small_repository, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    only_blue = set(small_processor.tokenizer("blue")["input_ids"]) - set(
        small_processor.tokenizer("USER: What color is it? Say red. It is green. Very much so. ASSISTANT:")[
            "input_ids"
        ]
    )
    weights["model.language_model.embed_tokens.weight"][sorted(only_blue)] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    order = ["training.train_sampling_strategy=sequential", "training.per_device_train_batch_size=1"]
    with pytest.raises(TrainingError, match=r"nan in step 1, with the samples sample-2\."):
        run(cpu_recipe, f"model.name={broken}", *order)


def test_the_best_checkpoint_is_kept(cpu_recipe, samples_folder):
    evaluation = f"{{samples: {samples_folder}/samples.json, images: {samples_folder}/images, missing_boxes: empty}}"
    output = run(
        cpu_recipe,
        f"evaluation={evaluation}",
        "training.learning_rate=3",  # gets worse and worse
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "training.metric_for_best_model=eval_loss",
        "training.greater_is_better=false",
        "training.save_total_limit=2",
        "training.load_best_model_at_end=true",
    )
    state = json.loads((output / "trainer_state.json").read_text())
    evaluated = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(evaluated, key=evaluated.get)
    assert state["best_global_step"] == best
    assert (output / f"checkpoint-{best}").is_dir() and (output / "checkpoint-6").is_dir()
    assert not changed_tensors(output / f"checkpoint-{best}", output)


def test_streaming_trains_too(cpu_recipe):
    changes = ["data.streaming=true", "training.max_steps=3", "training.train_sampling_strategy=sequential"]
    output = run(cpu_recipe, *changes)
    assert len(losses(output)) == 3
    with pytest.raises(TrainingError, match="group_by_length"):
        run(cpu_recipe, "data.streaming=true", "training.max_steps=3")


def test_adapters_are_saved_and_load(cpu_recipe, small_repository):
    from peft import PeftModel

    output = run(cpu_recipe, "lora.yaml", "training.learning_rate=1e-2")
    assert not (output / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(small_repository), output).merge_and_unload()
    original = AutoModel.from_pretrained(small_repository)
    changed = {
        name for name, value in loaded.state_dict().items() if not torch.equal(value, original.state_dict()[name])
    }
    layers = {name.split(".")[-2] for name in changed if "language_model" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    others = {name.split(".")[1] for name in changed if "language_model" not in name}
    assert others == {"fusion", "multi_modal_projector", "box_projector"}
    assert AutoProcessor.from_pretrained(output).chat_template


@pytest.mark.slow
def test_adapters_train_next_to_four_bits(cpu_recipe):
    output = run(
        cpu_recipe, "qlora.yaml", "global_batch_size=4", "training.learning_rate=1e-2", "training.max_steps=4"
    )
    assert losses(output)[4] < losses(output)[1]


def test_boxes_of_another_detector_are_refused(cpu_recipe):
    with pytest.raises(TrainingError, match="because the model has none"):
        run(cpu_recipe, "data.allow_other_boxes=false", "data.detector=null")
    with pytest.raises(TrainingError, match=r"data.detector.tagger.*coco80"):
        run(cpu_recipe, "data.allow_other_boxes=false")
    with pytest.raises((TrainingError, BoxFileError), match="was made with are unknown"):
        run(cpu_recipe, "data.allow_other_boxes=false", "data.detector.tagger=coco80")


def test_boxes_of_the_named_detector_are_taken(cpu_recipe, samples_folder, tmp_path):
    from mgllava.box_files import detection_settings, open_detector, read_boxes, write_boxes

    given = {"detector": "google/owlv2-large-patch14-ensemble", "tagger": "coco80"}
    settings = detection_settings(open_detector(**given))
    boxes = read_boxes(samples_folder / "boxes.json")
    write_boxes(tmp_path / "boxes.json", [boxes[key] for key in boxes], settings)
    changes = [f"data.boxes={tmp_path / 'boxes.json'}", "data.allow_other_boxes=false", "training.max_steps=1"]
    changes.append("training.save_strategy=no")
    run(cpu_recipe, *changes, "data.detector.tagger=coco80")
    with pytest.raises(TrainingError, match=r"threshold is 0.2, expected 0.3.*allow_other_boxes=true"):
        run(cpu_recipe, *changes, "data.detector.tagger=coco80", "data.detector.threshold=0.3")


def test_the_command_says_what_is_wrong(cpu_recipe):
    result = CliRunner().invoke(app, ["train", str(cpu_recipe), "training.learning_rat=1"])
    assert result.exit_code == 1
    assert "Did you mean `training.learning_rate`?" in result.stderr


def test_stage_1_starts_from_parts(cpu_recipe, tmp_path):
    write_samples(tmp_path / "few", count=2, text_every=2)
    parts = {"llm": GOLDEN / "llm", "vision_tower": GOLDEN / "clip", "high_res_tower": GOLDEN / "convnext"}
    changes = [f"model.parts.{name}={path}" for name, path in parts.items()]
    changes += [f"data.{name}={tmp_path / 'few' / file}" for name, file in (("samples", "samples.json"),)]
    changes += [f"data.images={tmp_path / 'few' / 'images'}", f"data.boxes={tmp_path / 'few' / 'boxes.json'}"]
    stage_1 = f"train={json.dumps(load_recipe('stage_1.yaml').train)}"
    changes += ["model.name=null", "model.parts.prompt_template=vicuna", "training.max_steps=2", stage_1]
    output = run(cpu_recipe, *changes, "global_batch_size=2", "training.save_strategy=no")
    changed = changed_tensors(output / "start", output)
    assert {name.split(".")[1] for name in changed} == {"fusion", "multi_modal_projector", "box_projector"}


@pytest.fixture
def collator_run(small_repository, small_processor, samples_folder, tmp_path):
    """Dataset, collator and arguments for trainers of others."""
    source = open_source(samples_folder / "samples.json", samples_folder / "images", samples_folder / "boxes.json")
    arguments = {
        "output_dir": str(tmp_path / "plain"),
        "remove_unused_columns": False,
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
    }
    model = AutoModel.from_pretrained(small_repository)
    return model, ConversationDataset([source], small_processor), MGLlavaDataCollator(small_processor), arguments


def test_the_collator_works_with_the_plain_trainer(collator_run, small_processor):
    model, dataset, collator, arguments = collator_run
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=small_processor,
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0]


def test_the_collator_works_with_trl(collator_run, small_processor, samples_folder):
    """From a dataset of messages and pictures, with adapters."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, _, collator, arguments = collator_run
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"It is {color}."}]},
            ],
            "images": [str(samples_folder / "images" / f"{number}.png")],
            "boxes": [{"boxes": [[5 + number, 10, 40 + number, 30]], "labels": ["square"], "scores": [0.9]}],
        }
        for number, color in ((0, "red"), (1, "green"), (2, "blue"), (4, "green"))
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**arguments, max_length=None),
        train_dataset=dataset,
        data_collator=collator,
        processing_class=small_processor,
        peft_config=lora_config(model, r=4),
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0]


@pytest.mark.parametrize("trainer_class", [Trainer, MGLlavaTrainer])
def test_predictions_are_logits_in_every_batch(trainer_class, collator_run, small_processor):
    """Batches with and without images in turn, whose outputs have other fields."""
    model, dataset, collator, arguments = collator_run
    seen, samples = [], [dataset[index] for index in (2, 3, 4)]

    def metrics(predicted):
        seen.append(predicted.predictions)
        chosen = predicted.predictions[:, :-1].argmax(-1)
        is_learned = predicted.label_ids[:, 1:] != -100
        return {"accuracy": float((chosen == predicted.label_ids[:, 1:])[is_learned].mean())}

    arguments |= {"per_device_eval_batch_size": 1}
    trainer = trainer_class(
        model,
        TrainingArguments(**arguments),
        eval_dataset=samples,
        data_collator=collator,
        processing_class=small_processor,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.float(),
    )
    result = trainer.evaluate()
    assert trainer.label_names == ["labels"]
    assert 0 <= result["eval_accuracy"] <= 1 and result["eval_loss"] > 0
    has_images = ["pixel_values" in collator([sample]) for sample in samples]
    assert has_images == [True, False, True]
    batch = collator(samples)
    assert seen[0].shape == (3, batch["input_ids"].shape[1], model.config.text_config.vocab_size)
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    is_text = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(seen[0])[is_text], logits[is_text], rtol=1e-3, atol=1e-3)


def test_columns_that_the_trainer_removed_are_named(collator_run, small_processor):
    model, dataset, collator, arguments = collator_run
    arguments |= {"remove_unused_columns": True}
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=[dataset[0]] * 4,
        data_collator=collator,
        processing_class=small_processor,
    )
    with pytest.raises(SampleError, match="remove_unused_columns=False"):
        trainer.train()


def test_errors_of_the_command_name_its_option(cpu_recipe):
    result = CliRunner().invoke(app, ["train", str(cpu_recipe), "training.resume_from_checkpoint=checkpoint-1"])
    assert result.exit_code == 1 and "Pass --resume when you start the training." in result.output
