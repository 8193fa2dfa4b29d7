"""What a checkpoint of SliME may lack: modules of later stages, and position embeddings."""

import math

import torch
from transformers import initialization as init

from mgllava.conversion.source_format import GatheredTensors
from mgllava.model_files.lazy_tensor import from_tensor
from mgllava.modeling import SlimeConfig
from mgllava.modeling.adapters_slime import (
    SlimeProjector,
    SlimeQueryAdapter,
    reset_adapter,
    reset_projector,
    sincos_positions,
)

from .key_mapping import COMPRESSOR, PROJECTOR

_ADAPTERS = (f"{PROJECTOR}query_adapter.", COMPRESSOR)
# So that a conversion that is resumed gets the same values.
_SEED = 0


def add_new_modules(tensors: GatheredTensors, config: SlimeConfig, dtype: torch.dtype) -> list[str]:
    """Initialize, as the original does, the modules that the checkpoint has no tensor of; return their names."""
    width = config.vision_config.hidden_size
    names = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        modules: dict[str, torch.nn.Module] = {}
        if not any(name.startswith(PROJECTOR) for name in tensors.used):
            projector = SlimeProjector(width, config.text_config.hidden_size, config.num_global_tokens, None)
            reset_adapter(projector.query_adapter, init)
            reset_projector(projector, init)
            modules[PROJECTOR] = projector
        if config.num_local_queries is not None and not any(name.startswith(COMPRESSOR) for name in tensors.used):
            compressor = SlimeQueryAdapter(width, config.num_local_queries)
            reset_adapter(compressor, init)
            modules[COMPRESSOR] = compressor
    for prefix, module in modules.items():
        names.append(prefix.rstrip("."))
        origin = f"initialized as the original does, with seed {_SEED}"
        for name, value in module.state_dict().items():
            tensors.used[prefix + name] = from_tensor(value.to(dtype), origin)
    return names


def add_positions(tensors: GatheredTensors, is_release: bool) -> list[str]:
    """Compute the position embeddings that a checkpoint lacks, rounded as the others of its tensors.

    Releases hold them. Where they are not numbers, the original computes them again.
    """
    computed = []
    for prefix in _ADAPTERS:
        queries, name = tensors.used.get(f"{prefix}queries"), f"{prefix}positions"
        stored = tensors.used.get(name)
        if queries is None or len(queries.shape) != 2 or (is_release and stored is None):
            continue
        if stored is not None and not stored.load().isnan().any():
            continue
        size = math.isqrt(queries.shape[0])
        if size**2 == queries.shape[0] and queries.shape[1] % 4 == 0:
            values = sincos_positions(size, queries.shape[1]).to(queries.dtype)
            tensors.used[name] = from_tensor(values, f"computed, in the dtype of {queries.origin}")
            tensors.kept.add(name)
            computed.append(name)
    return computed
