"""Training in two processes on the CPU (gloo) gives the losses and weights of training in one."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from mgllava.training import TrainingError, load_recipe, train
from tests import processes
from tests.training.conftest import losses

# Samples 3, 7 and 11 have no image. In this order and with this batch size, there are steps in which a batch of the
# second process has no image while all batches of the first one do.
ONE_BY_ONE = ("training.train_sampling_strategy=sequential", "training.per_device_train_batch_size=1")
SHORT = (*ONE_BY_ONE, "training.max_steps=2", "training.save_strategy=no", "training.lr_scheduler_type=constant")
# Name of a class of the wrapped model.
RUNS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPModule",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


def launch(kind, recipe, output, *changes):
    """Train in two processes, check that both used `kind`, and return the losses and the reports of the processes."""
    report = output.with_suffix(".json")
    overlays = [] if kind == "ddp" else [f"{kind}.yaml"]
    command = ["-m", "tests.training.worker", report, recipe, *overlays, *changes, f"training.output_dir={output}"]
    said = [output.with_suffix(f".log.{rank}") for rank in (0, 1)]
    workers = [
        processes.start(*command, output=log, **environment)
        for log, environment in zip(said, processes.group(2), strict=True)
    ]
    for process in workers:
        process.join(400)
    failed = [log.read_text()[-3000:] for process, log in zip(workers, said, strict=True) if process.exitcode != 0]
    assert not failed, failed[0]
    reports = [json.loads(output.with_suffix(f".json.{rank}").read_text()) for rank in (0, 1)]
    for rank, found in enumerate(reports):
        assert (found["rank"], found["processes"]) == (rank, 2)
        assert RUNS[kind] in found["kinds"]
        assert found["sharded"] == (1 if kind == "fsdp2" else 0)  # share of the trained parameters
        assert found["stage"] == {"zero2": 2, "zero3": 3}.get(kind, 0)
    return losses(output), reports


# DeepSpeed compiles C++ code where no earlier run has left it.
BFLOAT16 = [
    "fsdp2",
    pytest.param("zero2", marks=pytest.mark.slow),
    pytest.param("zero3", marks=pytest.mark.slow),
    pytest.param("ddp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", BFLOAT16)
def test_boxes_stay_integers_and_losses_stay_close_in_bfloat16(cpu_recipe, tmp_path, kind):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    expected = losses(train(load_recipe(cpu_recipe, *SHORT)))
    dtype = "bfloat16" if kind.startswith("zero") else "float32"
    found, reports = launch(kind, cpu_recipe, tmp_path / kind, *SHORT, "training.bf16=true", f"model.dtype={dtype}")
    assert found == pytest.approx(expected, abs=0.2)  # the first step lowers the loss by 1.8
    for report in reports:
        assert report["boxes"] == "torch.int64"
        # DistributedDataParallel and autocast keep features in the model's dtype, the others compute in bfloat16.
        assert report["features"] == ("torch.float32" if kind == "ddp" else "torch.bfloat16")


def test_fsdp_that_accelerate_would_ignore_is_refused(cpu_recipe):
    """With one process, or on CPUs, accelerate silently runs without FSDP."""
    with pytest.raises(TrainingError, match=r"`training.fsdp` .*got 1 process.*accelerate launch"):
        train(load_recipe(cpu_recipe, "fsdp2.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_losses_of_two_processes_equal_those_of_one(cpu_recipe, tmp_path, strategy):
    changes = (f"training.train_sampling_strategy={strategy}", "training.per_device_train_batch_size=1")
    expected = losses(train(load_recipe(cpu_recipe, *changes)))
    found, _ = launch("ddp", cpu_recipe, tmp_path / "two", *changes)
    assert found == pytest.approx(expected, abs=2e-4)
    # Without gradient accumulation, the steps are the same.
    at_once = ("training.per_device_train_batch_size=2", changes[0])
    assert launch("ddp", cpu_recipe, tmp_path / "at-once", *at_once)[0] == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_resume_with_the_same_losses(cpu_recipe, tmp_path, kind):
    whole, _ = launch(kind, cpu_recipe, tmp_path / "two", *ONE_BY_ONE, "training.save_total_limit=5")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "two" / f"checkpoint-{step}")
    (tmp_path / "two" / "trainer_state.json").unlink()
    resumed, _ = launch(kind, cpu_recipe, tmp_path / "two", *ONE_BY_ONE, "training.save_total_limit=5", "--resume")
    assert resumed == whole and len(whole) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_sharded_training_has_the_losses_and_weights_of_one_process(cpu_recipe, tmp_path, kind):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    alone = train(load_recipe(cpu_recipe, *ONE_BY_ONE))
    found, _ = launch(kind, cpu_recipe, tmp_path / kind, *ONE_BY_ONE)
    # ZeRO reduces gradients in the order in which they are computed, which must not depend on the presence of images.
    assert found == pytest.approx(losses(alone), abs=2e-4)
    whole, shared = load_file(alone / "model.safetensors"), load_file(tmp_path / kind / "model.safetensors")
    assert whole.keys() == shared.keys()
    for name, value in whole.items():
        torch.testing.assert_close(shared[name], value, atol=2e-2, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["lora.yaml", "stage_1.yaml"])
def test_fsdp2_trains_adapters_or_single_modules(cpu_recipe, small_repository, tmp_path, overlay):
    changes = ["lora.yaml"] if overlay == "lora.yaml" else [f"train={json.dumps(load_recipe(overlay).train)}"]
    changes += ["training.learning_rate=1e-2", "training.bf16=true"]
    found, _ = launch("fsdp2", cpu_recipe, tmp_path / "part", *changes, *SHORT)
    assert found[2] < found[1]
    if overlay == "lora.yaml":
        saved = load_file(tmp_path / "part" / "adapter_model.safetensors")
        names = ("fusion.high_res_conv.weight", "q_proj.lora_A.weight")
        assert all(any(key.endswith(name) for key in saved) for name in names)
        PeftModel.from_pretrained(AutoModel.from_pretrained(small_repository), tmp_path / "part")
