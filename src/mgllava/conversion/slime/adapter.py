"""LoRA adapters as PEFT saves them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgllava.conversion.lora import is_positive_number, merge_lora, scaling_of
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.json_files import read_json
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.tensor_files import open_safetensors, tensors_of
from mgllava.model_files.torch_files import open_torch_file

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPER = "base_model.model."
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
# Settings that change what an adapter means: the values that are merged as plain LoRA. The others need code of PEFT.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    # These start from the same base weights as plain LoRA; PiSSA, OLoRA, CorDA and LoftQ change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
}


@dataclass
class Adapter:
    """An opened adapter.

    Attributes:
        settings: Its `adapter_config.json`.
        factors: For each weight that has an update, its factors `"A"` and `"B"`, by the name in the base model.
        whole: Weights that were trained whole, by the name in the base model (with PEFT's prefix).
        files: The files read.
    """

    settings: dict[str, Any]
    factors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    whole: dict[str, LazyTensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def merge(self, base: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], list[str]]:
        """Merge the updates into weights of the base model, by its names; also return what fits no weight."""
        merged: dict[str, LazyTensor] = {}
        unexpected: list[str] = []
        for name, factors in self.factors.items():
            if name not in base or len(factors) != 2:
                lost = "base weight" if name not in base else "other factor"
                unexpected += [f"checkpoint: {one.origin} (its {lost} is missing)" for one in factors.values()]
                continue
            rank = next(iter(factors["A"].shape), 0)
            scaling = scaling_of(self.settings["lora_alpha"], rank, self.settings.get("use_rslora") is True)
            merged[name] = merge_lora(base[name], factors["A"], factors["B"], scaling)
        self._check_targets(base)
        return merged, unexpected

    def _check_targets(self, base: Mapping[str, LazyTensor]) -> None:
        """Raise if the adapter lacks updates that its settings promise: it would be merged in part."""
        targets = self.settings.get("target_modules")
        chosen = [
            name for name in ("layers_to_transform", "layers_pattern", "exclude_modules") if self.settings.get(name)
        ]
        if not isinstance(targets, list) or chosen:
            return
        endings = tuple(f".{target}.weight" for target in targets)
        lost = [name for name in base if f".{name}".endswith(endings) and name not in self.factors | self.whole]
        if lost:
            raise ConversionError(
                f"{self.files[0]} lacks the updates of {len(lost)} of the modules that `target_modules` in "
                f"{ADAPTER_CONFIG} names, such as {lost[0]}. Is the adapter complete?"
            )


def open_adapter(folder: Path, trust_pickle: bool) -> Adapter:
    """Open an adapter, and raise if it is not plain LoRA."""
    path = folder / ADAPTER_CONFIG
    settings = read_json(path, "checkpoint")
    for name, accepted in _PLAIN.items():
        if not any(settings.get(name) == one for one in accepted):
            raise ConversionError(
                f"`checkpoint`: `{name}` in {path} must be {' or '.join(map(repr, accepted))}, got "
                f"{settings.get(name)!r}. Merge the adapter with peft first."
            )
    if not is_positive_number(settings.get("lora_alpha")):
        raise ConversionError(
            f"`checkpoint`: `lora_alpha` in {path} must be a positive number, got {settings.get('lora_alpha')!r}."
        )
    found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not found:
        raise ConversionError(f"`checkpoint`: {folder} has no {' or '.join(_WEIGHTS)}.")
    file = found[0]
    is_pickle = file.suffix == ".bin"
    tensors = tensors_of(open_torch_file(file, trust_pickle), file) if is_pickle else open_safetensors(file)
    adapter = Adapter(settings, files=[file, path])
    for name, tensor in tensors.items():
        if match := _LOW_RANK.fullmatch(name.removeprefix(_WRAPPER)):
            adapter.factors.setdefault(f"{match['module']}.weight", {})[match["factor"]] = tensor
        else:
            adapter.whole[re.sub(r"\.modules_to_save(\.default)?\.", ".", name)] = tensor
    _check_saved_modules(adapter)
    return adapter


def _check_saved_modules(adapter: Adapter) -> None:
    """Raise if a module that was trained whole, by the settings, is not in the file."""
    modules = adapter.settings.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ConversionError(f"`checkpoint`: `modules_to_save` in {ADAPTER_CONFIG} must be a list of names.")
    lost = [name for name in modules if not any(f".{name}." in f".{whole}" for whole in adapter.whole)]
    if lost:
        raise ConversionError(
            f"{adapter.files[0]} does not hold {', '.join(lost)}, which {ADAPTER_CONFIG} lists in `modules_to_save`. "
            "Is the adapter complete?"
        )


__all__ = ["ADAPTER_CONFIG", "Adapter", "open_adapter"]
