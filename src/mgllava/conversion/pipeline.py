"""The steps of a conversion from any source format: gather, check, write, report."""

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save

from mgllava.families import FAMILIES, resolve
from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.json_files import read_json, try_read_json, write_json
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.shard_writer import Progress, ShardPlan, check_disk_space, plan_shards, write_shard
from mgllava.model_files.staging import REPORT_NAME, StagingFolder
from mgllava.model_files.tensor_files import sha256
from mgllava.model_files.tensor_matching import build_on_meta, match_tensors, stored_shapes
from mgllava.model_files.vocabulary import grow_table

from .detect import find_source
from .source_format import Gathered, SourceFormat

# Small enough to convert, resume and load on modest machines; the 50 GB of transformers suit only large ones.
DEFAULT_SHARD_SIZE = "5GB"
# Packages whose versions are in the report.
_PACKAGES = ("mgllava", "torch", "transformers", "timm")
_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
# Rotary position embeddings that are computed alike, whatever the number of positions.
_FIXED_ROPE_TYPES = ("default", "linear", "llama3")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run_conversion(
    formats: Sequence[SourceFormat],
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype,
    max_shard_size: str | int,
    trust_pickle: bool,
    overwrite: bool,
    progress: Progress | None,
    max_positions: int | None = None,
    **options: Any,
) -> Path:
    """Convert a checkpoint that has one of the formats into a model folder; the formats take `options`."""
    chosen_dtype = check_dtype(dtype)
    output = Path(output).absolute()
    progress = progress or (lambda stage, done, total: None)
    with StagingFolder(output, overwrite, *{one.model_type for one in formats}) as staging:
        path, source_format = find_source(checkpoint, formats, options, trust_pickle)
        staging.narrow(source_format.model_type)
        # Scratch files go to the output's disk, which needs room anyway; the system's folder may be a RAM disk.
        gathered = source_format.gather(path, options, trust_pickle, staging.output.parent)
        with gathered.resources:
            if max_positions is not None:
                set_max_positions(gathered.config, max_positions)
            model_class = resolve(FAMILIES[source_format.model_type].model)
            main_dtype = chosen_dtype or gathered.dtype
            _set_dtype(gathered.config, main_dtype)
            tensors = _match(gathered, model_class, source_format.problem)
            keep = gathered.tensors.kept if chosen_dtype is None else set()
            tensors = {name: tensor if name in keep else tensor.to(main_dtype) for name, tensor in tensors.items()}
            plan = plan_shards(tensors, max_shard_size)

            # From here on, large files are read and written: mistakes in small ones were reported before.
            digests = _digest_sources(gathered.tensors.files, staging, progress)
            _write_weights(staging, plan, digests, progress)
            gathered.config.save_pretrained(staging.path)
            # `save_pretrained` of a model copies its code; here is only the class.
            custom_object_save(model_class, staging.path)
            if gathered.generation_config is not None:
                gathered.generation_config.save_pretrained(staging.path)
            gathered.processor.save_pretrained(staging.path)
            _keep_box_detector(staging)
            given = {
                "checkpoint": checkpoint,
                **options,
                "dtype": dtype,
                "max_shard_size": max_shard_size,
                "max_positions": max_positions,
                "trust_pickle": trust_pickle,
            }
            run = _describe_run(given, gathered.tensors.files, digests, tensors, plan)
            report = {"dropped": _by_reason(gathered), **gathered.report}
            write_json(staging.path / REPORT_NAME, run | report)
        staging.publish()
    return output


def check_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Check the dtype that a user asks for; `None` for `"auto"`."""
    if isinstance(dtype, str) and dtype == "auto":
        return None
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ConversionError(f"`dtype` must be auto, {', '.join(_DTYPES)}, got {dtype}.")
    return found


def set_max_positions(config: Any, number: int) -> None:
    """Set the number of positions of the language model, if that changes nothing else."""
    text_config = config.get_text_config()
    if number < 1:
        raise ConversionError(f"`max_positions` must be a positive number, got {number}.")
    rope = getattr(text_config, "rope_parameters", None) or {}
    if not rope or getattr(text_config, "max_position_embeddings", None) is None:
        raise ConversionError(
            f"`max_positions` must be None for a language model of type {text_config.model_type!r}: it has no rotary "
            "position embeddings, whose number could be chosen."
        )
    # The parameters of all layers, or those of each kind of layer.
    parameters = [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]
    kinds = {value.get("rope_type", "default") for value in parameters} - set(_FIXED_ROPE_TYPES)
    if kinds:
        raise ConversionError(
            f"`max_positions` must be None for rotary position embeddings of type {', '.join(sorted(kinds))}: they "
            "depend on this number, so that the model would compute something else. Use fewer frames instead, or a "
            "language model for longer texts."
        )
    text_config.max_position_embeddings = number


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for name in config.sub_configs:
        getattr(config, name).dtype = dtype


def _match(gathered: Gathered, model_class: Any, problem: str) -> dict[str, LazyTensor]:
    """Check that sources and model match name by name, and return the tensors in the model's order."""
    try:
        model = build_on_meta(model_class, gathered.config)
    except Exception as error:  # a config may be wrong in many ways
        raise ConversionError(f"No model can be built from these parts: {one_line(error)}") from error
    tensors = dict(gathered.tensors.used)
    for name, target in (model.all_tied_weights_keys or {}).items():
        if name in tensors and target in tensors:
            if not torch.equal(tensors[name].load(), tensors[target].load()):
                raise ConversionError(
                    f"The config ties {name} to {target}, but their values differ in the checkpoint. "
                    "Set tie_word_embeddings to false in the config.json of `llm`."
                )
            gathered.tensors.drop("renamed", name, f"equal to {target}, which it is tied to")
            del tensors[name]
    vocabulary = gathered.vocabulary
    for name in _TABLES:
        if vocabulary and name in tensors and tensors[name].shape[:1] == (vocabulary.original_rows,):
            tensors[name] = grow_table(tensors[name], vocabulary.padded_rows)
    return match_tensors(tensors, stored_shapes(model), gathered.tensors.unexpected, problem)


def _digest_sources(
    sources: Mapping[str, Sequence[Path]], staging: StagingFolder, progress: Progress
) -> dict[str, str]:
    """Return the SHA-256 of every source file by its path; checksums in the files are verified along the way."""
    files = list(dict.fromkeys(path for paths in sources.values() for path in paths))
    for path in files:
        for folder in (staging.output, staging.path):
            if path.resolve().is_relative_to(folder):
                raise ConversionError(f"{path} is inside {folder}, which would be replaced. Choose another `output`.")
    total = sum(path.stat().st_size for path in files)
    return {str(path): sha256(path, lambda done: progress("reading sources", done, total)) for path in files}


def _write_weights(
    staging: StagingFolder, plan: ShardPlan, source_digests: Mapping[str, str], progress: Progress
) -> None:
    """Write the index and all weight shards, except for those that an interrupted run finished."""
    # The digests have no paths, because the sources may be moved between two runs.
    contents = {f"{number}": digest for number, digest in enumerate(sorted(source_digests.values()))}
    done = staging.keep_finished({shard.filename: shard.digest(contents) for shard in plan.shards}, plan.shards)
    total = sum(shard.size for shard in plan.shards)
    check_disk_space(staging.path, sum(shard.size for shard in plan.shards if shard.filename not in done))
    for shard in plan.shards:
        if shard.filename in done:
            progress("writing weights", shard.size, total)
        else:
            write_shard(shard, staging.path, lambda count: progress("writing weights", count, total))
    if plan.index is not None:
        write_json(staging.path / "model.safetensors.index.json", plan.index)


def _keep_box_detector(staging: StagingFolder) -> None:
    """Copy the box detector's settings from the processor that is replaced; the files of its parts stay."""
    name, key = "processor_config.json", "box_detector_config"
    old = (try_read_json(staging.output / name) or {}).get(key)
    if isinstance(old, dict):
        write_json(staging.path / name, {**read_json(staging.path / name), key: old})


def _by_reason(gathered: Gathered) -> dict[str, dict[str, list[str]]]:
    dropped: dict[str, dict[str, list[str]]] = {}
    for source, names in gathered.tensors.dropped.items():
        for name, reason in names.items():
            dropped.setdefault(source, {}).setdefault(reason, []).append(name)
    return dropped


def _describe_run(
    given: Mapping[str, Any],
    sources: Mapping[str, Sequence[Path]],
    digests: Mapping[str, str],
    tensors: Mapping[str, LazyTensor],
    plan: ShardPlan,
) -> dict[str, Any]:
    """Return the part of the report that is the same for all source formats."""
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": {name: value if value is None else str(value) for name, value in given.items()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "sources": {
            source: [{"file": str(path), "bytes": path.stat().st_size, "sha256": digests[str(path)]} for path in files]
            for source, files in sources.items()
        },
        "files": {shard.filename: shard.size for shard in plan.shards},
        "tensors": {
            name: {"from": tensor.origin, "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in tensors.items()
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


__all__ = ["DEFAULT_SHARD_SIZE", "check_dtype", "run_conversion"]
