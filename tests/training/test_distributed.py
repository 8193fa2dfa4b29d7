"""Several processes on the CPU (gloo): what they compute together is what one process computes."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from mgllava.training import load_recipe, train
from tests.training.conftest import losses

pytestmark = pytest.mark.slow

# Samples 3, 7 and 11 are text alone: taken one by one in order, the second process meets steps in which one of its
# batches, and none of the first process's, is without an image.
ONE_BY_ONE = ("training.train_sampling_strategy=sequential", "training.per_device_train_batch_size=1")


def launch(recipe, output, *changes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "mgllava.cli", "train", str(recipe), *changes, f"training.output_dir={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(output)


@pytest.fixture
def alone(cpu_recipe):
    """Losses of one process, and where it wrote."""
    output = train(load_recipe(cpu_recipe, *ONE_BY_ONE))
    return losses(output), output


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length"])
def test_two_processes_have_the_losses_of_one(cpu_recipe, tmp_path, strategy):
    changes = (f"training.train_sampling_strategy={strategy}", "training.per_device_train_batch_size=1")
    expected = losses(train(load_recipe(cpu_recipe, *changes)))
    found = launch(cpu_recipe, tmp_path / "two", *changes)
    assert found == pytest.approx(expected, abs=2e-4)
    # The whole batch at a time: other micro-batches, the same step.
    at_once = ("training.per_device_train_batch_size=2", changes[0])
    assert launch(cpu_recipe, tmp_path / "at-once", *at_once) == pytest.approx(expected, abs=2e-4)


def test_two_processes_resume(cpu_recipe, tmp_path, alone):
    launch(cpu_recipe, tmp_path / "two", *ONE_BY_ONE, "training.max_steps=4", "training.lr_scheduler_type=constant")
    found = launch(cpu_recipe, tmp_path / "two", *ONE_BY_ONE, "training.lr_scheduler_type=constant", "--resume")
    whole = launch(cpu_recipe, tmp_path / "whole", *ONE_BY_ONE, "training.lr_scheduler_type=constant")
    assert found == whole and len(whole) == 6


def test_fsdp2(cpu_recipe, tmp_path, alone):
    expected, output = alone
    found = launch(cpu_recipe, tmp_path / "fsdp", "fsdp2.yaml", *ONE_BY_ONE)
    assert found == pytest.approx(expected, abs=2e-4)
    whole, shared = load_file(output / "model.safetensors"), load_file(tmp_path / "fsdp" / "model.safetensors")
    assert whole.keys() == shared.keys()
    assert {name: value.shape for name, value in whole.items()} == {n: v.shape for n, v in shared.items()}


def test_zero_2(cpu_recipe, tmp_path, alone):
    pytest.importorskip("deepspeed")
    expected, _ = alone
    found = launch(cpu_recipe, tmp_path / "zero", "zero2.yaml", *ONE_BY_ONE)
    # It reduces gradients in the order in which they come, so this order must not depend on whether there are images.
    assert found == pytest.approx(expected, abs=2e-4)
    assert load_file(tmp_path / "zero" / "model.safetensors")
