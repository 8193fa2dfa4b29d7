"""Write state dicts in the layout that DeepSpeed's reader expects."""

import math
from collections import OrderedDict

import torch


def _model_states(shapes, frozen, fragments, extra):
    return {
        "module": {},
        "buffer_names": [],
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())],
        "frozen_param_shapes": OrderedDict((name, value.shape) for name, value in frozen.items()) or None,
        "frozen_param_fragments": fragments or None,
        "shared_params": {},
        "ds_version": "0.14.4",
        **extra,
    }


def write_zero(folder, state, *, stage, world_size=2, frozen=None, extra=None):
    """Write `state` (trained, float32) and `frozen` as `world_size` processes would; stage 2 or 3."""
    folder.mkdir(parents=True)
    frozen, extra = frozen or {}, extra or {}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    flat = [value.float().flatten() for value in state.values()]
    if stage == 3:
        per_rank = [[] for _ in range(world_size)]
        for value in flat:
            for rank, part in enumerate(_pad(value, world_size).chunk(world_size)):
                per_rank[rank].append(part)
        groups = [[torch.cat(parts)] for parts in per_rank]
    else:
        groups = [[part.clone()] for part in _pad(torch.cat(flat), 2 * world_size).chunk(world_size)]
    for rank, group in enumerate(groups):
        if stage == 3:
            fragments = {
                name: _pad(value.flatten(), world_size).chunk(world_size)[rank].clone()
                for name, value in frozen.items()
            }
            content = _model_states(shapes, frozen, fragments, extra)
            torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {"zero_stage": stage, "partition_count": world_size if stage == 3 else [world_size], key: group}
        optimizer["loss_scaler"] = _loss_scaler()
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_version": "0.14.4"},
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    if stage < 3:
        torch.save(_model_states(shapes, frozen, dict(frozen), extra), folder / "mp_rank_00_model_states.pt")
    return folder


def _pad(flat, multiple):
    return torch.nn.functional.pad(flat, (0, math.ceil(flat.numel() / multiple) * multiple - flat.numel()))


def _loss_scaler():
    # Every file of deepspeed has such an object.
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    return LossScaler(1.0)
