"""Samples that turn out to be damaged: they have no weight, are counted, and never make a number NaN."""

import json
import math

import pytest
import torch
from transformers import AutoModel, Trainer, TrainingArguments

from mgllava.training import (
    ConversationDataset,
    MGLlavaDataCollator,
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
    """Twelve samples with a picture each; a function that damages some of the pictures, and names the samples."""
    folder = tmp_path / "damaged"
    write_samples(folder, text_every=0)

    def damage(*numbers):
        for number in numbers:
            # It is there, so only reading it tells.
            (folder / "images" / f"{number}.png").write_bytes(b"no picture")
        return [f"data.{name}={folder / file}" for name, file in SOURCE.items()]

    return damage


SOURCE = {"samples": "samples.json", "images": "images", "boxes": "boxes.json"}


def logged(output, name):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_step_without_a_sample_has_no_weight_and_is_counted(cpu_recipe, tmp_path, damaged, batch_size):
    """However its batches are accumulated."""
    size = f"training.per_device_train_batch_size={batch_size}"
    whole = losses(train(load_recipe(cpu_recipe, *ORDER, *damaged(), size, f"training.output_dir={tmp_path / 'all'}")))
    output = train(load_recipe(cpu_recipe, *ORDER, *damaged(4, 5, 6, 7), size))
    found = losses(output)
    assert found[1] == pytest.approx(whole[1], abs=1e-4)
    assert found[2] == found[5] == 0 and all(math.isfinite(value) for value in found.values())
    assert logged(output, "empty_steps")[6] == 2 and logged(output, "skipped_samples")[6] == 8
    assert min(found[4], found[6]) < found[1]


def test_the_last_batch_may_be_the_one_without_a_sample(cpu_recipe, damaged):
    changes = ("training.num_train_epochs=1", "training.per_device_train_batch_size=8", "global_batch_size=8")
    output = train(load_recipe(cpu_recipe, *ORDER, *damaged(8, 9, 10, 11), *changes))
    assert losses(output)[2] == 0 and logged(output, "empty_steps")[2] == 1


@pytest.mark.parametrize("length", ["training.num_train_epochs=2", "training.max_steps=2"])
def test_a_training_that_skipped_everything_is_an_error(cpu_recipe, tmp_path, damaged, length):
    with pytest.raises(TrainingError, match="Nothing was learned: all samples were skipped"):
        train(load_recipe(cpu_recipe, *ORDER, *damaged(*range(12)), length))
    assert not list((tmp_path / "out").glob("*.safetensors"))


EVALUATION = ("training.eval_strategy=epoch", "training.num_train_epochs=1", "training.per_device_eval_batch_size=2")


def evaluated(recipe, damaged, *numbers, skip="skip"):
    changes = [change.replace("data.", "evaluation.") for change in damaged(*numbers)]
    changes.append("evaluation.allow_other_boxes=true")
    return train(load_recipe(recipe, *ORDER, *EVALUATION, *changes, f"evaluation.on_bad_sample={skip}"))


def test_an_evaluation_counts_what_it_could_read(cpu_recipe, tmp_path, damaged):
    """The loss of two samples that are left, one batch of them, is that of a file that has no others."""
    few = tmp_path / "few"
    write_samples(few, count=2, text_every=0)
    changes = [f"evaluation.{name}={few / file}" for name, file in SOURCE.items()]
    changes.append("evaluation.allow_other_boxes=true")
    other = f"training.output_dir={tmp_path / 'other'}"
    expected = logged(train(load_recipe(cpu_recipe, *ORDER, *EVALUATION, *changes, other)), "eval_loss")
    output = evaluated(cpu_recipe, damaged, *range(2, 12))
    assert logged(output, "eval_loss") == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_of_nothing_is_an_error(cpu_recipe, damaged):
    with pytest.raises(TrainingError, match="All samples of the evaluation were skipped"):
        evaluated(cpu_recipe, damaged, *range(12))


def test_an_evaluation_has_its_own_rule_for_bad_samples(cpu_recipe, damaged):
    with pytest.raises(TrainingError, match="Sample sample-3"):
        evaluated(cpu_recipe, damaged, 3, skip="error")


def test_the_plain_trainer_has_no_nan_either(small_repository, small_processor, damaged, tmp_path):
    paths = [change.partition("=")[2] for change in damaged(*range(4, 8))]
    trainer = Trainer(
        AutoModel.from_pretrained(small_repository),
        TrainingArguments(
            str(tmp_path / "plain"),
            remove_unused_columns=False,
            use_cpu=True,
            per_device_train_batch_size=4,
            max_steps=3,
            logging_steps=1,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=ConversationDataset([open_source(*paths)], small_processor),
        data_collator=MGLlavaDataCollator(small_processor, on_bad_sample="skip"),
    )
    trainer.train()
    assert trainer.state.log_history[1]["loss"] == 0
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_several_processes_skip_what_one_skips(cpu_recipe, tmp_path, damaged):
    """A step without a sample in one of two processes, and one without any."""
    changes = (*ORDER, *damaged(0, 2, 4, 5, 6, 7), "training.per_device_train_batch_size=1")
    expected = train(load_recipe(cpu_recipe, *changes))
    found, _ = launch("ddp", cpu_recipe, tmp_path / "two", *changes)
    assert found == pytest.approx(losses(expected), abs=2e-4) and found[2] == 0
    assert logged(tmp_path / "two", "skipped_samples") == logged(expected, "skipped_samples")
