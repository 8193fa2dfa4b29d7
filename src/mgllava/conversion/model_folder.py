"""Model folders as the source of an export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgllava.families import FAMILIES, resolve
from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.json_files import read_json
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.staging import REPORT_NAME
from mgllava.model_files.tensor_matching import build_on_meta, match_tensors, stored_shapes


def read_model_config(folder: Path, model_type: str) -> Any:
    """Read the configuration of a model folder; refuse other model types and quantized weights."""
    family = FAMILIES[model_type]
    if not folder.is_dir():
        raise ConversionError(f"`checkpoint` must be a model folder of {family.title}, but {folder} is not a folder.")
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} is not a model folder of {family.title}: it has no config.json.")
    content = read_json(folder / "config.json")
    if content.get("model_type") != model_type:
        raise ConversionError(
            f"{folder} is not a model folder of {family.title}: its config.json has model type "
            f"{content.get('model_type')!r}."
        )
    _refuse_quantized(content, folder)
    try:
        return resolve(family.config).from_pretrained(folder)
    except Exception as error:  # a config may be wrong in many ways
        reason = one_line(error.__cause__ or error)
        raise ConversionError(f"config.json of {folder} cannot be read ({reason}).") from error


def _refuse_quantized(content: Mapping[str, Any], folder: Path) -> None:
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]
    for part in parts:
        for name in ("quantization_config", "compression_config"):
            if part.get(name) is not None:
                method = part[name].get("quant_method") if isinstance(part[name], dict) else None
                raise ConversionError(
                    f"{folder} is quantized ({method or name}): its weights are packed numbers, which the original "
                    "code cannot read. Export the model that it was quantized from."
                )


def check_weights(tensors: Mapping[str, LazyTensor], config: Any, folder: Path) -> None:
    """Check that the weights are those of the model, and numbers by themselves."""
    try:
        model = build_on_meta(resolve(FAMILIES[config.model_type].model), config)
    except Exception as error:  # a config may be wrong in many ways
        raise ConversionError(f"No model can be built from config.json of {folder}: {error}") from error
    untied = {name: tensor for name, tensor in tensors.items() if name not in (model.all_tied_weights_keys or {})}
    match_tensors(untied, stored_shapes(model), [], f"The weights in {folder} are not those of its config.json.")


def read_report(folder: Path, fields: Mapping[str, type], consequence: str) -> dict[str, Any]:
    """Read what the report of a conversion says about the checkpoint, with these fields; empty without a report."""
    path = folder / REPORT_NAME
    if not path.is_file():
        return {}
    checkpoint = read_json(path).get("checkpoint")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), fields[key]) for key in fields):
        raise ConversionError(
            f"{path} is not the report of a conversion, or is damaged. Remove it to export {consequence}."
        )
    return checkpoint


__all__ = ["check_weights", "read_model_config", "read_report"]
