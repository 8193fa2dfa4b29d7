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
from transformers import AutoModel, AutoProcessor, Trainer
from typer.testing import CliRunner

from mgllava.box_files import BoxFileError
from mgllava.cli import app
from mgllava.training import (
    MGLlavaTrainer,
    SampleError,
    TrainingError,
    load_recipe,
    lora_config,
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
def test_stage_changes_exactly_the_modules_of_its_recipe(cpu_recipe, small_repository, finished, stage):
    # `cpu_recipe` extends stage 2.
    declared = f"train={json.dumps(load_recipe('stage_1.yaml').train)}"
    output = run(cpu_recipe, declared) if stage == "stage_1" else finished
    changed = changed_tensors(small_repository, output)
    # Tensors are compared as a whole: embeddings of words that do not occur in the samples do not change.
    assert {name.removeprefix("model.").split(".")[0] for name in changed} == set(STAGES[stage])
    assert min(losses(output).values()) < losses(output)[1]


def test_result_is_a_model_folder_with_processor_recipe_and_log(finished, samples_folder):
    model, processor = AutoModel.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
    picture = samples_folder / "images" / "0.png"
    inputs = processor(str(picture), "USER: <image>\nWhat? ASSISTANT:", boxes=[[[5, 10, 40, 30]]], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    assert load_recipe(finished / "recipe.yaml") == load_recipe(finished.parent / "recipe.yaml")
    state = json.loads((finished / "trainer_state.json").read_text())
    assert state["global_step"] == 6 and (finished / "loss.png").exists()
    logged = state["log_history"][0]
    assert logged["tokens_per_second"] > 0 and "images_per_second" in logged
    assert [path.name for path in sorted(finished.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]
    assert AutoProcessor.from_pretrained(finished / "checkpoint-4").chat_template == processor.chat_template
    assert json.loads((finished / "config.json").read_text())["text_config"].get("use_cache", True)


@pytest.mark.parametrize("changes", [(), ("lora.yaml", "lora.lora_dropout=0.3", "training.learning_rate=1e-2")])
def test_losses_of_a_resumed_and_an_uninterrupted_training_are_equal(cpu_recipe, changes):
    """Training resumes in the middle of the first epoch, with shuffled, grouped batches and, for LoRA, dropout."""
    output = run(cpu_recipe, "training.save_total_limit=5", *changes)
    whole = losses(output)
    assert len(set(whole.values())) == 6
    for step in (4, 6):
        shutil.rmtree(output / f"checkpoint-{step}")
    (output / "trainer_state.json").unlink()
    run(cpu_recipe, "training.save_total_limit=5", *changes, resume=True)
    assert losses(output) == whole


def test_folder_with_checkpoints_is_not_overwritten(cpu_recipe):
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


def test_checkpoint_whose_saving_was_killed_is_not_used(cpu_recipe, finished, tmp_path):
    # The order of floating-point sums depends on the number of threads.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert processes.run("-c", KILLED_WHILE_SAVING, cpu_recipe, **threads) == -signal.SIGKILL
    output = tmp_path / "out"
    # `save_total_limit` is 1, but the older checkpoint is kept until the newer one is complete.
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert last_complete_checkpoint(output) == output / "checkpoint-2"

    run(cpu_recipe, "training.save_total_limit=1", resume=True)
    assert losses(output) == losses(finished)
    assert last_complete_checkpoint(output) == output / "checkpoint-6"


@pytest.mark.slow
def test_training_that_is_killed_or_meets_a_full_disk_ends_with_the_same_losses(cpu_recipe, tmp_path):
    """Ten interruptions: kills while loading, training and saving, and writes that fail halfway."""
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
        if whole is not None:
            load_file(whole / "model.safetensors")
    if not (output / "model.safetensors").exists():
        run(cpu_recipe, *changes, resume=True)
    assert losses(output) == expected


def test_incomplete_checkpoints_are_skipped(finished, tmp_path, caplog):
    output = shutil.copytree(finished, tmp_path / "copy")
    (output / "checkpoint-6" / "optimizer.pt").unlink()
    assert last_complete_checkpoint(output) == output / "checkpoint-4"
    assert f"{output / 'checkpoint-6'} is skipped: it is incomplete" in caplog.text
    with (output / "checkpoint-4" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert last_complete_checkpoint(output) is None


def test_nan_loss_stops_the_training_and_names_the_samples(cpu_recipe, small_repository, small_processor, tmp_path):
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


def test_best_checkpoint_is_kept_and_loaded(cpu_recipe, samples_folder):
    evaluation = f"{{samples: {samples_folder}/samples.json, images: {samples_folder}/images, missing_boxes: empty}}"
    output = run(
        cpu_recipe,
        f"evaluation={evaluation}",
        "training.learning_rate=3",  # so high that the loss increases
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


def test_streamed_samples_are_trained_on_in_order(cpu_recipe):
    changes = ["data.streaming=true", "training.max_steps=3", "training.train_sampling_strategy=sequential"]
    output = run(cpu_recipe, *changes)
    assert len(losses(output)) == 3
    with pytest.raises(TrainingError, match="group_by_length"):
        run(cpu_recipe, "data.streaming=true", "training.max_steps=3")


def test_adapters_are_saved_and_loaded(cpu_recipe, small_repository):
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
def test_qlora_lowers_the_loss(cpu_recipe):
    output = run(
        cpu_recipe, "qlora.yaml", "global_batch_size=4", "training.learning_rate=1e-2", "training.max_steps=4"
    )
    assert losses(output)[4] < losses(output)[1]


def test_box_file_of_another_detector_is_refused(cpu_recipe):
    with pytest.raises(TrainingError, match="because the model has none"):
        run(cpu_recipe, "data.allow_other_boxes=false", "data.detector=null")
    with pytest.raises(TrainingError, match=r"data.detector.tagger.*coco80"):
        run(cpu_recipe, "data.allow_other_boxes=false")
    with pytest.raises((TrainingError, BoxFileError), match="was made with are unknown"):
        run(cpu_recipe, "data.allow_other_boxes=false", "data.detector.tagger=coco80")


def test_box_file_of_the_detector_in_the_recipe_is_accepted(cpu_recipe, samples_folder, tmp_path):
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


def test_stage_1_trains_a_model_built_from_parts(cpu_recipe, tmp_path):
    write_samples(tmp_path / "few", count=2, text_every=2)
    parts = {"llm": GOLDEN / "llm", "vision_tower": GOLDEN / "clip", "high_res_tower": GOLDEN / "convnext"}
    changes = [f"model.parts.{name}={path}" for name, path in parts.items()]
    files = {"samples": "samples.json", "images": "images", "boxes": "boxes.json"}
    changes += [f"data.{name}={tmp_path / 'few' / file}" for name, file in files.items()]
    stage_1 = f"train={json.dumps(load_recipe('stage_1.yaml').train)}"
    changes += ["model.name=null", "model.parts.prompt_template=vicuna", "training.max_steps=2", stage_1]
    output = run(cpu_recipe, *changes, "global_batch_size=2", "training.save_strategy=no")
    changed = changed_tensors(output / "start", output)
    assert {name.split(".")[1] for name in changed} == {"fusion", "multi_modal_projector", "box_projector"}


def logged_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_collator_works_with_the_trainer_of_transformers(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert logged_losses(trainer)[-1] < logged_losses(trainer)[0]


def test_collator_works_with_trl_and_adapters(make_trainer, small_repository, samples_folder):
    """The dataset has TRL's columns `messages` and `images`."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
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
    trainer = make_trainer(
        datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image())),
        trl.SFTTrainer,
        trl.SFTConfig,
        trainer_options={"peft_config": lora_config(AutoModel.from_pretrained(small_repository), r=4)},
        max_length=None,
    )
    trainer.train()
    assert logged_losses(trainer)[-1] < logged_losses(trainer)[0]


@pytest.mark.parametrize("trainer_class", [Trainer, MGLlavaTrainer])
def test_predictions_of_an_evaluation_are_logits_for_batches_with_and_without_images(trainer_class, make_trainer):
    """Models return image features too, but only for batches with images."""
    seen = []

    def metrics(predicted):
        seen.append(predicted.predictions)
        chosen = predicted.predictions[:, :-1].argmax(-1)
        is_learned = predicted.label_ids[:, 1:] != -100
        return {"accuracy": float((chosen == predicted.label_ids[:, 1:])[is_learned].mean())}

    options = {
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.float(),
    }
    trainer = make_trainer(trainer_class=trainer_class, trainer_options=options, per_device_eval_batch_size=1)
    samples = [trainer.train_dataset[index] for index in (2, 3, 4)]
    result = trainer.evaluate(samples)
    assert trainer.label_names == ["labels"]
    assert 0 <= result["eval_accuracy"] <= 1 and result["eval_loss"] > 0
    model, collator = trainer.model, trainer.data_collator
    has_images = ["pixel_values" in collator([sample]) for sample in samples]
    assert has_images == [True, False, True]
    batch = collator(samples)
    assert seen[0].shape == (3, batch["input_ids"].shape[1], model.config.text_config.vocab_size)
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    is_text = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(seen[0])[is_text], logits[is_text], rtol=1e-3, atol=1e-3)


def test_error_names_columns_that_the_trainer_removed(make_trainer):
    sample = make_trainer().train_dataset[0]
    with pytest.raises(SampleError, match="remove_unused_columns=False"):
        make_trainer([sample] * 4, remove_unused_columns=True).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rat=1", "Did you mean `training.learning_rate`?"),
        ("training.resume_from_checkpoint=checkpoint-1", "Pass --resume when you start the training."),
    ],
)
def test_command_prints_what_is_wrong_and_which_option_to_use(cpu_recipe, change, message):
    result = CliRunner().invoke(app, ["train", str(cpu_recipe), change])
    assert result.exit_code == 1 and message in result.stderr
