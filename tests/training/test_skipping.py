"""Samples whose images cannot be read: they are skipped and counted, and no loss or weight becomes NaN."""

import json
import math

import pytest
import torch

from mgllava.training import (
    ConversationDataset,
    MGLlavaDataCollator,
    MGLlavaTrainer,
    TrainingError,
    load_recipe,
    open_source,
    train,
)
from tests.training.conftest import losses, write_samples
from tests.training.test_distributed import launch

ORDER = ("training.train_sampling_strategy=sequential", "training.save_strategy=no", "data.on_bad_sample=skip")


@pytest.fixture
def damaged(tmp_path):
    """Return a function that damages some of twelve images and returns the settings for the samples."""
    folder = tmp_path / "damaged"
    write_samples(folder, text_every=0)

    def damage(*numbers):
        for number in numbers:
            # The file exists, so the fault is only found when it is read.
            (folder / "images" / f"{number}.png").write_bytes(b"no picture")
        return [f"data.{name}={folder / file}" for name, file in SOURCE.items()]

    return damage


SOURCE = {"samples": "samples.json", "images": "images", "boxes": "boxes.json"}


def logged(output, name):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_steps_whose_samples_are_all_skipped_have_zero_loss_and_are_counted(cpu_recipe, tmp_path, damaged, batch_size):
    size = f"training.per_device_train_batch_size={batch_size}"
    first = ("training.max_steps=1", f"training.output_dir={tmp_path / 'all'}")
    whole = losses(train(load_recipe(cpu_recipe, *ORDER, *damaged(), size, *first)))
    output = train(load_recipe(cpu_recipe, *ORDER, *damaged(4, 5, 6, 7), size))
    found = losses(output)
    assert found[1] == pytest.approx(whole[1], abs=1e-4)
    assert found[2] == found[5] == 0 and all(math.isfinite(value) for value in found.values())
    assert logged(output, "empty_steps")[6] == 2 and logged(output, "skipped_samples")[6] == 8
    assert min(found[4], found[6]) < found[1]


def test_steps_whose_samples_are_all_skipped_do_not_change_the_weights(cpu_recipe, tmp_path, damaged):
    """Neither by momentum nor by weight decay."""
    changes = (*ORDER, *damaged(4, 5, 6, 7), "training.lr_scheduler_type=constant", "training.weight_decay=0.1")
    saved = []
    for steps in (1, 2, 3):
        numbers = f"training.max_steps={steps}", f"training.output_dir={tmp_path / str(steps)}"
        output = train(load_recipe(cpu_recipe, *changes, "training.warmup_steps=0", *numbers))
        saved.append((output / "model.safetensors").read_bytes())
    assert saved[0] == saved[1] != saved[2]


def test_all_samples_of_the_last_batch_may_be_skipped(cpu_recipe, damaged):
    changes = ("training.num_train_epochs=1", "training.per_device_train_batch_size=8", "global_batch_size=8")
    output = train(load_recipe(cpu_recipe, *ORDER, *damaged(8, 9, 10, 11), *changes))
    assert losses(output)[2] == 0 and logged(output, "empty_steps")[2] == 1


@pytest.mark.parametrize("length", ["training.num_train_epochs=2", "training.max_steps=2"])
def test_training_that_skips_all_samples_is_an_error(cpu_recipe, tmp_path, damaged, length):
    with pytest.raises(TrainingError, match="Nothing was learned: all samples were skipped"):
        train(load_recipe(cpu_recipe, *ORDER, *damaged(*range(12)), length))
    assert not list((tmp_path / "out").glob("*.safetensors"))


EVALUATION = ("training.eval_strategy=epoch", "training.num_train_epochs=1", "training.per_device_eval_batch_size=2")


def evaluated(recipe, damaged, *numbers, skip="skip"):
    changes = [change.replace("data.", "evaluation.") for change in damaged(*numbers)]
    changes.append("evaluation.allow_other_boxes=true")
    return train(load_recipe(recipe, *ORDER, *EVALUATION, *changes, f"evaluation.on_bad_sample={skip}"))


def test_skipped_samples_do_not_change_the_evaluation_loss(cpu_recipe, tmp_path, damaged):
    """If ten of twelve samples are skipped, the loss is that of a file with the other two only."""
    few = tmp_path / "few"
    write_samples(few, count=2, text_every=0)
    changes = [f"evaluation.{name}={few / file}" for name, file in SOURCE.items()]
    changes.append("evaluation.allow_other_boxes=true")
    other = f"training.output_dir={tmp_path / 'other'}"
    expected = logged(train(load_recipe(cpu_recipe, *ORDER, *EVALUATION, *changes, other)), "eval_loss")
    output = evaluated(cpu_recipe, damaged, *range(2, 12))
    assert logged(output, "eval_loss") == pytest.approx(expected, rel=1e-5)


def test_skipped_batches_do_not_change_an_evaluation_under_another_name(make_trainer, small_processor, damaged):
    collator = MGLlavaDataCollator(small_processor, on_bad_sample="skip", return_sample_ids=True)
    options = {"trainer_options": {"eval_data_collator": collator}, "per_device_eval_batch_size": 4}
    paths = [change.partition("=")[2] for change in damaged(4, 5, 6, 7)]
    dataset = ConversationDataset([open_source(*paths)], small_processor)
    trainer = make_trainer(dataset, trainer_class=MGLlavaTrainer, **options)
    whole = trainer.evaluate(dataset, metric_key_prefix="test")
    rest = trainer.evaluate([dataset[index] for index in (0, 1, 2, 3, 8, 9, 10, 11)])
    assert whole["test_loss"] == pytest.approx(rest["eval_loss"], rel=1e-5) and "eval_loss" not in whole


def test_evaluation_that_skips_all_samples_is_an_error(cpu_recipe, damaged):
    with pytest.raises(TrainingError, match="All samples of the evaluation were skipped"):
        evaluated(cpu_recipe, damaged, *range(12))


def test_evaluation_has_its_own_on_bad_sample(cpu_recipe, damaged):
    with pytest.raises(TrainingError, match="Sample sample-3"):
        evaluated(cpu_recipe, damaged, 3, skip="error")


def test_trainer_of_transformers_has_zero_loss_where_all_samples_are_skipped(make_trainer, small_processor, damaged):
    paths = [change.partition("=")[2] for change in damaged(*range(4, 8))]
    trainer = make_trainer(
        ConversationDataset([open_source(*paths)], small_processor),
        on_bad_sample="skip",
        max_steps=3,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert trainer.state.log_history[1]["loss"] == 0
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_several_processes_skip_the_same_samples_as_one(cpu_recipe, tmp_path, damaged):
    """In one step one of the two processes has no sample, and in another step neither has."""
    changes = (*ORDER, *damaged(0, 2, 4, 5, 6, 7), "training.per_device_train_batch_size=1")
    expected = train(load_recipe(cpu_recipe, *changes))
    found, _ = launch("ddp", cpu_recipe, tmp_path / "two", *changes)
    assert found == pytest.approx(losses(expected), abs=2e-4) and found[2] == 0
    assert logged(tmp_path / "two", "skipped_samples") == logged(expected, "skipped_samples")
