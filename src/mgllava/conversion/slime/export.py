"""Export a SliME model folder to a checkpoint of the original code."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mgllava.conversion.model_folder import check_weights, read_model_config, read_report
from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.json_files import read_json, write_json
from mgllava.model_files.lazy_tensor import LazyTensor, from_tensor
from mgllava.model_files.shard_writer import ShardPlan, check_disk_space, plan_shards, write_shard
from mgllava.model_files.staging import StagingFolder
from mgllava.model_files.tensor_files import open_weights
from mgllava.modeling import SlimeConfig

from .config_mapping import HUB_ID, ORIGINAL_TYPE, original_config
from .key_mapping import PROJECTOR, VISION_TOWER, to_original

logger = logging.getLogger(__name__)

_SHARD_SIZE = "5GB"
_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_TOWER_FOLDER = "vision_tower"
_REPORT = {"kind": str, "config": dict, "has_vision_tower": bool, "table_rows": int, "used_rows": int}


def export_slime(repository: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a checkpoint of the original code, a folder, from a model folder.

    If the model folder has the report of its conversion, the checkpoint has the values of the `config.json` that was
    converted where the model has the same, its rows of the embedding table, and CLIP's weights if it had them. A LoRA
    release is exported merged. The last layer of CLIP, which is not used, is not in a model folder; the original loads
    it from the Hub repository that `mm_vision_tower` names. If that is not a Hub id, the vision tower is written to
    the folder `vision_tower`, without the last layer's weights.

    Args:
        repository (`str` or `Path`): A SliME model folder.
        output (`str` or `Path`): The folder to write.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a checkpoint at `output`.

    Returns:
        `Path`: The output.

    Raises:
        ConversionError: If `repository` is not a SliME model folder, is quantized or incomplete, or if the language
            model is not a Llama; or if the output exists.
    """
    repository, output = Path(repository), Path(output).absolute()
    config = read_model_config(repository, SlimeConfig.model_type)
    if config.text_config.model_type != "llama":
        raise ConversionError(
            f"The original SliME has Llama for its language model, and {repository} has "
            f"{config.text_config.model_type!r}."
        )
    if not config.router_sees_answers:
        logger.warning("The original has no `router_sees_answers=False`: its router sees the answers in training.")
    report = read_report(repository, _REPORT, "without the values of the converted checkpoint")
    tensors, files = open_weights(repository)
    check_weights(tensors, config, repository)
    with StagingFolder(output, overwrite, ORIGINAL_TYPE) as staging:
        for file in files:
            if file.resolve().is_relative_to(staging.output) or file.resolve().is_relative_to(staging.path):
                raise ConversionError(f"{file} lies in {output}, which would be replaced. Choose another `output`.")
        rows = _table_rows(config, report)
        original = original_config(config, report.get("config", {}), rows, tensors[_TABLES[0]].dtype)
        if report.get("pad_token_id") == config.text_config.pad_token_id and "pad_token_id" in report["config"]:
            # Still the tokenizer's, which replaced that of the checkpoint.
            original["pad_token_id"] = report["config"]["pad_token_id"]
        weights = _to_original(tensors, config, report, rows)
        plan = plan_shards(weights, _SHARD_SIZE)
        staging.keep_finished({}, [])
        check_disk_space(staging.path, sum(shard.size for shard in plan.shards))
        _write_weights(plan, staging.path)
        if not HUB_ID.fullmatch(str(original.get("mm_vision_tower"))):
            _write_tower(tensors, config, repository, staging.path / _TOWER_FOLDER)
            original["mm_vision_tower"] = _TOWER_FOLDER
        write_json(staging.path / "config.json", original)
        _write_generation_config(repository, staging.path)
        _write_tokenizer(repository, config, original, staging.path)
        staging.publish()
    return output


def _table_rows(config: SlimeConfig, report: Mapping[str, Any]) -> int:
    """Return the number of rows of the original's table: the converted one's, unless tokens were added since."""
    used = config.unpadded_vocab_size or config.text_config.vocab_size
    rows: int = report["table_rows"] if report and report["used_rows"] == used else used
    return min(rows, config.text_config.vocab_size)


def _to_original(
    tensors: Mapping[str, LazyTensor], config: SlimeConfig, report: Mapping[str, Any], rows: int
) -> dict[str, LazyTensor]:
    """Rename all tensors that the checkpoint gets, and add the constants that the original stores."""
    has_tower = report.get("has_vision_tower", True)
    kept = {name: tensor for name, tensor in tensors.items() if has_tower or not name.startswith(VISION_TOWER)}
    kept |= {name: _cut(kept[name], rows) for name in _TABLES if name in kept}
    weights, unknown = to_original(kept)
    if unknown:
        raise ConversionError(f"The original has no place for {len(unknown)} of the tensors, such as {unknown[0]}.")
    gate = tensors[f"{PROJECTOR}gate"]
    constants = {"w_noise": torch.zeros(gate.shape), "mean": torch.zeros(1), "std": torch.ones(1)}
    for name, value in constants.items():
        weights[f"model.mm_projector.{name}"] = from_tensor(value.to(gate.dtype), "constant")
    return weights


def _cut(table: LazyTensor, rows: int) -> LazyTensor:
    """Take the first rows of a table."""
    return LazyTensor((rows, *table.shape[1:]), table.dtype, table.origin, lambda: table.load()[:rows])


def _write_weights(plan: ShardPlan, folder: Path) -> None:
    for shard in plan.shards:
        write_shard(shard, folder, lambda count: None)
    if plan.index is not None:
        write_json(folder / "model.safetensors.index.json", plan.index)


def _write_tower(tensors: Mapping[str, LazyTensor], config: SlimeConfig, repository: Path, folder: Path) -> None:
    """Write the vision tower as a model folder of CLIP, whose config has the layer that is not stored."""
    folder.mkdir()
    weights = {
        f"vision_model.{name.removeprefix(VISION_TOWER)}": tensor
        for name, tensor in tensors.items()
        if name.startswith(VISION_TOWER)
    }
    _write_weights(plan_shards(weights, _SHARD_SIZE), folder)
    values = config.vision_config.to_dict()
    values |= {"num_hidden_layers": values["num_hidden_layers"] + 1, "architectures": ["CLIPVisionModel"]}
    write_json(folder / "config.json", values)
    side = config.vision_config.image_size
    processor = repository / "processor_config.json"
    settings = read_json(processor).get("image_processor") if processor.is_file() else None
    settings = settings if isinstance(settings, dict) else {}
    statistics = {name: settings[name] for name in ("image_mean", "image_std") if name in settings}
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
            "resample": 3,
            "rescale_factor": 1 / 255,
            **statistics,
        },
    )


def _write_generation_config(repository: Path, folder: Path) -> None:
    if (repository / "generation_config.json").is_file():
        try:
            values: Any = GenerationConfig.from_pretrained(repository)
        except Exception as error:  # a config may be wrong in many ways
            raise ConversionError(
                f"generation_config.json of {repository} cannot be read ({one_line(error)})."
            ) from error
        values.suppress_tokens = None  # rows that the original does not have
        values.save_pretrained(folder)


def _write_tokenizer(repository: Path, config: SlimeConfig, original: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer without the placeholder, if a conversion added it."""
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(repository)
        placeholder = tokenizer.convert_ids_to_tokens(config.image_token_id)
        tokenizer.padding_side = original.get("tokenizer_padding_side", "right")
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises `Exception` itself
        raise ConversionError(f"The tokenizer in {repository} cannot be read ({one_line(error)}).") from error
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = read_json(folder / "tokenizer_config.json")
    # In the form of the releases that the original runs with.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in (
        "backend",
        "is_local",
        "local_files_only",
        "chat_template",
        "image_token",
        "processor_class",
        "auto_map",
    ):
        settings.pop(name, None)
    merges = content["model"].get("merges")
    if merges and not any(" " in part for merge in merges for part in merge):
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
    if config.unpadded_vocab_size is not None and config.image_token_id >= config.unpadded_vocab_size:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != placeholder]
        for name in ("extra_special_tokens", "additional_special_tokens"):
            if isinstance(settings.get(name), list):
                settings[name] = [token for token in settings[name] if token != placeholder]
    write_json(folder / "tokenizer.json", content)
    # The original reads the added tokens from here, too.
    settings["added_tokens_decoder"] = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in content["added_tokens"]
    }
    write_json(folder / "tokenizer_config.json", settings)


__all__ = ["export_slime"]
