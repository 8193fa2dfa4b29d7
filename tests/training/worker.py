"""One of several processes: trains with a recipe, like `mgllava train`, and writes a report about the wrapped model.

`main` takes `REPORT.json RECIPE.yaml [MORE.yaml|KEY=VALUE]... [--resume]`; torchrun may start it too, as a module.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from mgllava.modeling.vision_mgllava import MGLlavaBoxProjector
from mgllava.training import load_recipe, run, train


def shard_on_cpus():
    """Let accelerate run FSDP on CPUs: it checks this type for accelerators, while torch can shard with gloo too."""
    prepare = PartialState.__init__

    def __init__(self, *args, **kwargs):  # noqa: N807
        prepare(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = __init__


def send_with_gloo():
    """Keep DeepSpeed from compiling C++ code that sends through shared memory, which takes minutes."""
    import deepspeed

    extension = "deepspeed_shm_comm"
    assert extension in deepspeed.ops.__compatible_ops__
    deepspeed.ops.__compatible_ops__[extension] = False


def main(report, *arguments):
    found = {}
    recipe = load_recipe(*(argument for argument in arguments if argument != "--resume"))
    if recipe.training.get("fsdp"):
        shard_on_cpus()
    if recipe.training.get("deepspeed"):
        send_with_gloo()

    project = MGLlavaBoxProjector.forward

    def forward(self, feature_maps, boxes):
        found.update(features=str(feature_maps[0].dtype), boxes=str(boxes.dtype), box=boxes[0, 0].tolist())
        return project(self, feature_maps, boxes)

    MGLlavaBoxProjector.forward = forward

    class Trainer(run.MGLlavaTrainer):
        def _inner_training_loop(self, *args, **kwargs):
            result = super()._inner_training_loop(*args, **kwargs)
            parameters = [parameter for parameter in self.model_wrapped.parameters() if parameter.requires_grad]
            found.update(
                kinds=[kind.__name__ for kind in type(self.model_wrapped).__mro__],
                sharded=sum(isinstance(parameter, DTensor) for parameter in parameters) / len(parameters),
                stage=getattr(self.model_wrapped, "zero_optimization_stage", int)(),
                processes=torch.distributed.get_world_size(),
                rank=torch.distributed.get_rank(),
            )
            return result

    run.MGLlavaTrainer = Trainer
    train(recipe, resume="--resume" in arguments)
    Path(f"{report}.{os.environ['RANK']}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
