"""What `MGLlavaTrainer` adds to `Trainer`: order, learning rates, the log, and resuming."""

import copy
import inspect
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

from mgllava.training import (
    ConversationDataset,
    MGLlavaDataCollator,
    MGLlavaTrainer,
    ModalityLengthSampler,
    TrainingError,
    open_source,
    trainer,
)
from mgllava.training.checkpoints import last_complete_checkpoint
from tests.training.conftest import write_samples


@pytest.fixture
def make(make_trainer):
    def make(**arguments):
        return make_trainer(trainer_class=MGLlavaTrainer, **arguments)

    return make


@pytest.mark.parametrize(("seeds", "seed"), [({"seed": 3}, 3), ({"seed": 3, "data_seed": 5}, 5)])
def test_groups_are_of_all_samples_of_a_step(make, seeds, seed):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, **seeds}
    one = make(train_sampling_strategy="group_by_length", **options)
    data = one.train_dataset
    expected = list(ModalityLengthSampler(data.lengths, 6, seed, data.modalities))
    assert list(one._get_train_sampler()) == list(one._get_train_sampler(data)) == expected
    assert not isinstance(make(**options)._get_train_sampler(), ModalityLengthSampler)
    # Evaluation keeps the order of the dataset.
    order = [batch["labels"] for batch in one.get_eval_dataloader(data)]
    assert torch.equal(order[0][0], one.data_collator([data[index] for index in range(8)])["labels"][0])
    assert len(order) == 2 and torch.equal(
        order[1], one.data_collator([data[index] for index in range(8, 12)])["labels"]
    )


def test_lengths_of_other_datasets_are_not_needed_without_groups(make):
    samples = [make().train_dataset[index] for index in range(4)]
    one = make(dataset=samples, train_sampling_strategy="sequential")
    assert list(one._get_train_sampler()) == [0, 1, 2, 3]


def test_modules_have_their_learning_rates(make):
    rates = {"fusion": 1e-3, "language_model.layers.1": 1e-4}
    one = make(trainer_options={"learning_rates": rates}, learning_rate=1e-2, weight_decay=0.1)
    optimizer = one.create_optimizer()
    assert one.create_optimizer() is optimizer
    names = {id(parameter): name for name, parameter in one.model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        assert group["params"]
        found |= {names[id(parameter)]: (group["lr"], group["weight_decay"]) for parameter in group["params"]}
    plain = make(learning_rate=1e-2, weight_decay=0.1)
    given = {id(parameter): name for name, parameter in plain.model.named_parameters()}
    expected = {}
    for group in plain.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = given[id(parameter)]
            near = [rate for pattern, rate in rates.items() if name.startswith(f"model.{pattern}.")]
            expected[name] = ((near or [1e-2])[0], group["weight_decay"])
    assert found == expected and {rate for rate, _ in found.values()} == {1e-2, 1e-3, 1e-4}


@pytest.mark.skipif(
    "model" not in inspect.signature(Trainer.create_optimizer).parameters, reason="5.16 has no such argument"
)
@pytest.mark.parametrize("rates", [None, {"fusion": 1e-3}])
def test_the_optimizer_may_be_that_of_another_model(make, rates):
    one = make(trainer_options={"learning_rates": rates})
    other = copy.deepcopy(one.model)
    groups = one.create_optimizer(other).param_groups
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    expected = {
        id(parameter): 1e-3 if rates and name.startswith("model.fusion.") else 1e-2
        for name, parameter in other.named_parameters()
    }
    assert found == expected


def test_the_log_has_speed_and_memory_since_the_last_log(make, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    one = make(max_steps=2, train_sampling_strategy="sequential")
    seen = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            now[0] += 4.0
            seen.append(state.global_step)

    one.add_callback(Clock())
    one.train()
    batches = [one.data_collator([one.train_dataset[index] for index in range(first, first + 4)]) for first in (0, 4)]
    logged = [entry for entry in one.state.log_history if "loss" in entry]
    assert [entry["tokens_per_second"] for entry in logged] == [
        round(int(batch["attention_mask"].sum()) / 4, 1) for batch in batches
    ]
    # One of four samples is text.
    assert [entry["images_per_second"] for entry in logged] == [0.75, 0.75]
    assert not {"skipped_samples", "lost_samples", "empty_steps"} & set().union(*one.state.log_history)
    assert ("peak_memory_gib" in logged[0]) == torch.cuda.is_available()
    one.training_step(one.model, one._prepare_inputs(batches[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    one.log({"loss": 1.0})
    one.log({"eval_loss": 1.0})
    assert one.state.log_history[-2]["peak_memory_gib"] == 1.5
    assert "tokens_per_second" not in one.state.log_history[-1]


def test_a_training_that_learns_warns_of_nothing(make, caplog):
    with caplog.at_level(logging.WARNING, logger="mgllava"):
        make(max_steps=1).train()
    assert not [record for record in caplog.records if record.name.startswith("mgllava")]


def test_the_loss_of_an_evaluation_is_the_mean_of_its_batch(make):
    one = make()
    batch = one.data_collator([one.train_dataset[index] for index in (0, 1)])
    count = (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        mean = one.compute_loss(one.model.eval(), dict(batch), num_items_in_batch=torch.tensor(1))
        total = one.compute_loss(one.model.train(), dict(batch), num_items_in_batch=torch.tensor(1))
    torch.testing.assert_close(mean * count, total, rtol=1e-4, atol=0)


def test_training_that_skips_all_samples_stops_after_an_epoch(make, small_processor, tmp_path):
    write_samples(tmp_path / "gone")
    files = [tmp_path / "gone" / name for name in ("samples.json", "images", "boxes.json")]
    dataset = ConversationDataset([open_source(*files)], small_processor)
    shutil.rmtree(tmp_path / "gone" / "images")
    samples = [sample for sample in dataset if "images" in sample]
    one = make(dataset=samples, on_bad_sample="skip", max_steps=-1, num_train_epochs=3)
    one.data_collator.return_sample_ids = True
    with pytest.raises(TrainingError, match="all samples were skipped"):
        one.train()
    assert one.state.epoch == 1


def test_the_cache_of_keys_is_not_computed(make):
    one = make()
    given = []
    one.model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    one.evaluate([one.train_dataset[0]])
    assert given[0]["use_cache"] is False and not {"sample_ids", "skipped_samples", "lost_samples"} & given[0].keys()


def test_training_resumes_from_the_last_complete_checkpoint_or_says_that_there_is_none(make, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(TrainingError, match=r"No checkpoint in .*trainer is complete"):
        make(**options).train(resume_from_checkpoint=True)
    make(**options).train()
    output = tmp_path / "trainer"
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert last_complete_checkpoint(output) == output / "checkpoint-2"
    state = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())
    again = make(**{**options, "max_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and again.args.save_total_limit == 1
    assert again.state.log_history[:2] == state["log_history"][:2]


def test_sharding_sees_no_saved_buffers(make, monkeypatch):
    """FSDP in two processes is tested in subprocesses."""
    seen = []

    def prepare(self, model, *others):
        seen.append("marks" in model.state_dict())
        return (model, *others)

    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    monkeypatch.setattr(Accelerator, "prepare", prepare)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: None)
    one = make()
    one.model.register_buffer("marks", torch.ones(2))
    assert one.accelerator.prepare(one.model, "optimizer") == (one.model, "optimizer")
    assert seen == [False] and "marks" in one.model.state_dict()


def test_evaluation_has_its_own_collator(make, small_processor):
    own = MGLlavaDataCollator(small_processor, max_text_length=20)
    one = make(trainer_options={"eval_data_collator": own})
    widths = {batch["input_ids"].shape[1] for batch in one.get_eval_dataloader([one.train_dataset[3]] * 2)}
    assert widths == {own([one.train_dataset[3]])["input_ids"].shape[1]} and one.data_collator is not own
