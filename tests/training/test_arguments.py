"""What a recipe becomes for transformers' `Trainer`, and what is refused before a model is loaded."""

import pytest
from transformers import TrainingArguments

from mgllava.training import Recipe, TrainingError, arguments
from mgllava.training.arguments import training_arguments
from mgllava.training.recipe import DataOptions

DEMANDED = {"remove_unused_columns": False, "label_names": ["labels"]}


def made(data=None, evaluation=None, lora=None, global_batch_size=None, **training):
    recipe = Recipe(data=data or DataOptions(), evaluation=evaluation, lora=lora, global_batch_size=global_batch_size)
    recipe.training = {"output_dir": "out", "use_cpu": True, "bf16": False, **training}
    return training_arguments(recipe)


def test_defaults_differ_from_those_of_transformers_where_it_needs_them():
    args = made()
    assert {name: getattr(args, name) for name in DEMANDED} == DEMANDED
    assert args.report_to == [] and args.ddp_find_unused_parameters is False
    args = made(**DEMANDED, ddp_find_unused_parameters=True)
    assert {name: getattr(args, name) for name in DEMANDED} == DEMANDED and args.ddp_find_unused_parameters


SAMPLES = DataOptions(samples="s.json")
REFUSED = {
    "output": ({"output_dir": ""}, r"`training\.output_dir` must say where to write"),
    "columns": ({"remove_unused_columns": True}, r"`training\.remove_unused_columns` must be False, got True"),
    "labels": ({"label_names": ["a"]}, r"`training\.label_names` must be \['labels'\], got \['a'\]"),
    **{
        name: ({name: value}, rf"`training\.{name}` has no effect here")
        for name, value in {"do_eval": 1, "do_predict": 1, "do_train": 1, "resume_from_checkpoint": "a"}.items()
    },
    "first evaluation": ({"eval_on_start": True}, r"`training\.eval_strategy` needs samples"),
    "evaluations": ({"eval_strategy": "epoch"}, r"`training\.eval_strategy` needs samples"),
    "no evaluation": ({"evaluation": SAMPLES}, r"`evaluation` would not be used"),
    "no strategy": ({"evaluation": SAMPLES, "eval_strategy": "no"}, r"`evaluation` would not be used"),
    "two accumulations": ({"global_batch_size": 8, "gradient_accumulation_steps": 1}, "Give either"),
    "changing batches": ({"global_batch_size": 8, "auto_find_batch_size": True}, "would change `global_batch_size`"),
    "optimizer": ({"optim": "adamw_torch_npu_fused"}, r"`training\.optim` or .* cannot be used"),
    "schedule": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"x": 1}},
        "cannot be used with their opt",
    ),
    "shards": ({"fsdp": "full_shard"}, r"`training\.fsdp` needs several processes with a GPU each, got 1 process on "),
    "type": ({"lr_scheduler_type": "x"}, "`training` cannot be used: '?x'? is not a valid SchedulerType"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_ignored_or_fail_later_is_refused(kind):
    given, message = REFUSED[kind]
    with pytest.raises(TrainingError, match=message):
        made(**given)


@pytest.mark.parametrize("evaluates", [{"eval_on_start": True}, {"eval_strategy": "epoch"}])
def test_samples_to_evaluate_on_may_be_used_at_the_start_or_later(evaluates):
    made(evaluation=SAMPLES, **evaluates)


def test_sharding_that_accelerate_asks_for_is_refused_on_a_cpu(monkeypatch):
    made()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with pytest.raises(TrainingError, match=r"training\.fsdp"):
        made()


def test_streamed_batches_are_not_split_over_processes():
    data = DataOptions(samples="s.json", streaming=True)
    assert made(data=data).accelerator_config.dispatch_batches is False
    config = made(data=data, accelerator_config={"even_batches": False}).accelerator_config
    assert (config.dispatch_batches, config.even_batches) == (False, False)
    assert made().accelerator_config.dispatch_batches is not False
    made(train_sampling_strategy="group_by_length")
    with pytest.raises(TrainingError, match="group_by_length"):
        made(data=data, train_sampling_strategy="group_by_length")


def test_activation_checkpointing_of_sharded_adapters_is_that_of_the_model():
    sharded = {"fsdp_config": {"activation_checkpointing": True, "version": 2}}
    for lora, inside in (({"r": 4}, False), (None, True)):
        args = made(lora=lora, **sharded)
        assert args.fsdp_config == {"activation_checkpointing": inside, "version": 2}
        assert args.gradient_checkpointing is (not inside)
    assert made(lora={"r": 4}).gradient_checkpointing is False


@pytest.mark.skipif(not hasattr(TrainingArguments, "activation_checkpointing"), reason="5.16 has only the older name")
def test_both_names_of_activation_checkpointing_work():
    for names in (["gradient_checkpointing"], ["activation_checkpointing"]):
        assert made(**dict.fromkeys(names, True)).activation_checkpointing
    names = ["gradient_checkpointing", "activation_checkpointing"]
    assert made(**dict.fromkeys(names, True)).activation_checkpointing
    with pytest.raises(TrainingError, match="are two names of one option, got True and False"):
        made(gradient_checkpointing=True, activation_checkpointing=False)


def test_gradients_are_accumulated_to_the_global_batch(monkeypatch):
    assert made(global_batch_size=32, per_device_train_batch_size=4).gradient_accumulation_steps == 8
    assert made(global_batch_size=16).gradient_accumulation_steps == 2  # 8 is the default of transformers
    with pytest.raises(TrainingError, match=r"multiple of 4 \(processes: 1, .*got 6"):
        made(global_batch_size=6, per_device_train_batch_size=4)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match=r"multiple of 12 \(processes: 3, .*got 32"):
        made(global_batch_size=32, per_device_train_batch_size=4)


@pytest.mark.parametrize("name", ["dataloader_persistent_workers", "dataloader_prefetch_factor"])
def test_options_of_workers_are_ignored_with_a_warning_without_workers(name, caplog):
    made(**{name: 2, "dataloader_num_workers": 2})
    assert not caplog.text
    made(**{name: 2})
    assert f"`training.{name}` is ignored" in caplog.text


def test_one_gpu_of_several_is_used(monkeypatch, caplog):
    class OfManyGpus(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(arguments, "TrainingArguments", OfManyGpus)
    assert made().n_gpu == 1 and "Using 1 of 4 GPUs" in caplog.text
    monkeypatch.setattr(OfManyGpus, "n_gpu", 4)
    with pytest.raises(RuntimeError, match="uses all GPUs in one process"):
        made()
