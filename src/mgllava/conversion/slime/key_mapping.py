"""Names of parameters in the checkpoints of SliME and in its model folders."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from mgllava.conversion.parts import CLIP_TO_MODEL, LANGUAGE_MODEL_TO_MODEL, Rules, Source, drop_reason, rename
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.lazy_tensor import LazyTensor

PROJECTOR, COMPRESSOR = "model.multi_modal_projector.", "model.local_compressor."
VISION_TOWER = "model.vision_tower."
_ADAPTERS = (
    ("model.mm_projector.attn.", f"{PROJECTOR}query_adapter."),
    ("model.sampler.post_qformer.", COMPRESSOR),
)
_ADAPTER_PARTS = (
    ("query", "queries"),
    ("pos_embed", "positions"),
    ("attn.out_proj.", "out_proj."),
    ("ln_q.", "query_norm."),
    ("ln_kv.", "context_norm."),
    ("ln_post.", "output_norm."),
)
# `in_proj` holds three matrices one above the other.
_PACKED: Rules = tuple((f"{theirs}attn.in_proj_", ours) for theirs, ours in _ADAPTERS)
_PACKED_PARTS = ("q_proj", "k_proj", "v_proj")
_CLIP: Rules = tuple((f"model.vision_tower.vision_tower.{theirs}", ours) for theirs, ours in CLIP_TO_MODEL)
_OWN: Rules = (
    *((f"{theirs}{part}", f"{ours}{name}") for theirs, ours in _ADAPTERS for part, name in _ADAPTER_PARTS),
    ("model.mm_projector.projection.0.", f"{PROJECTOR}linear_1."),
    ("model.mm_projector.projection.2.", f"{PROJECTOR}linear_2."),
    ("model.mm_projector.w_gate", f"{PROJECTOR}gate"),
)
_DROPS: Rules = (
    (r"model\.mm_projector\.w_noise$", "not used: the original scales the gate's noise by w_gate"),
    (r"model\.mm_projector\.(mean|std)$", "buffer, a constant"),
    (r"model\.image_newline$", "not used: the merge types of SliME have no newline"),
)
# What PEFT and DeepSpeed put in front of names.
_WRAPPERS = ("module.", "base_model.model.")


def to_model(tensors: Mapping[str, LazyTensor], files: list[Path]) -> Source:
    """Rename the tensors of a checkpoint."""
    source = Source(files=files)
    for name, tensor in tensors.items():
        short = name
        for wrapper in _WRAPPERS:
            short = short.removeprefix(wrapper)
        renamed = _rename(short, tensor)
        if twice := sorted(renamed.keys() & source.names.keys()):
            raise ConversionError(
                f"{files[0].parent} has two tensors for one parameter: {source.names[twice[0]]} and {name}. Remove "
                "the one that is not meant."
            )
        source.tensors |= renamed
        source.names |= dict.fromkeys(renamed, name)
        if not renamed:
            if (reason := drop_reason(short, _DROPS)) is not None:
                source.dropped[name] = reason
            else:
                source.unexpected.append(f"{name} {tensor.shape}")
    return source


def _rename(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    """Return a tensor by its name in the model; the three parts of a packed one; nothing if no rule covers it."""
    if (packed := rename(name, _PACKED)) is not None:
        module, _, kind = packed.rpartition(".")
        return {f"{module}.{part}.{kind}": _third(tensor, index) for index, part in enumerate(_PACKED_PARTS)}
    is_own = name.startswith(("model.mm_", "model.sampler.", "model.vision_tower.", "model.image_newline"))
    new_name = rename(name, (*_OWN, *_CLIP) if is_own else LANGUAGE_MODEL_TO_MODEL)
    return {} if new_name is None else {new_name: tensor}


def _third(tensor: LazyTensor, index: int) -> LazyTensor:
    """Cut one of three equal parts out of a tensor."""
    rows = tensor.shape[0] // 3 if tensor.shape else 0
    if not rows or rows * 3 != tensor.shape[0]:
        raise ConversionError(f"{tensor.origin} must hold three parts of equal size, got shape {tensor.shape}.")

    def load() -> torch.Tensor:
        return tensor.load()[index * rows : (index + 1) * rows]

    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, f"{tensor.origin}, part {index + 1} of 3", load)


def to_original(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
    """Rename the tensors of a model as the original does, and list the names that it has no place for."""
    rules = tuple(
        (ours, theirs)
        for theirs, ours in (*_OWN, *LANGUAGE_MODEL_TO_MODEL, *_CLIP)
        # Of the two prefixes of CLIP, the one that the original writes.
        if not theirs.startswith("model.vision_tower.") or ".vision_model." in theirs
    )
    renamed: dict[str, LazyTensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module.endswith(_PACKED_PARTS) and module.startswith((PROJECTOR, COMPRESSOR)):
            if module.endswith(_PACKED_PARTS[0]):
                adapter = module.removesuffix(_PACKED_PARTS[0])
                packed = rename(adapter, tuple((ours, theirs) for theirs, ours in _PACKED))
                parts = [tensors[f"{adapter}{part}.{kind}"] for part in _PACKED_PARTS]
                renamed[f"{packed}{kind}"] = _stack(parts)
        elif (old_name := rename(name, rules)) is not None:
            renamed[old_name] = tensor
        else:
            unknown.append(name)
    return renamed, unknown


def _stack(parts: list[LazyTensor]) -> LazyTensor:
    """Put tensors one above the other."""
    first = parts[0]
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    origin = " and ".join(part.origin for part in parts)
    return LazyTensor(shape, first.dtype, origin, partial(_load_stacked, parts))


def _load_stacked(parts: list[LazyTensor]) -> torch.Tensor:
    return torch.cat([part.load() for part in parts])


__all__ = ["COMPRESSOR", "PROJECTOR", "VISION_TOWER", "to_model", "to_original"]
