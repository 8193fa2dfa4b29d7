"""The original checkpoint of RAM++, with its tag list and thresholds."""

import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch

from mgllava.conversion.detect import tensor_names
from mgllava.conversion.parts import drop_reason, rename
from mgllava.conversion.source_format import Gathered, GatheredTensors, SourceFormat
from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.json_files import read_json
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.tensor_files import tensors_of
from mgllava.model_files.torch_files import StoredTensor, open_torch_file
from mgllava.modeling import RamPlusConfig
from mgllava.modeling.configuration_ram_plus import DEFAULT_TAG_THRESHOLD
from mgllava.processing import RamPlusImageProcessor

_ORIGINAL = "https://raw.githubusercontent.com/xinyu1205/recognize-anything/main/ram/data/"
TAG_LIST_URL = _ORIGINAL + "ram_tag_list.txt"
THRESHOLDS_URL = _ORIGINAL + "ram_tag_list_threshold.txt"
_MAX_TEXT_BYTES = 1 << 24
_URL_SECONDS = 30

_LABEL_EMBED = "label_embed"
_MODEL = "model"
_ENDINGS = (".pth", ".pt")

_TO_MODEL: tuple[tuple[str, str], ...] = (
    # The original merges patches at the end of a stage, timm at the start of the next.
    *((f"visual_encoder.layers.{s}.downsample.", f"vision_tower.layers.{s + 1}.downsample.") for s in range(3)),
    ("visual_encoder.", "vision_tower."),
    ("image_proj.", "image_projection."),
    ("wordvec_proj.", "decoder.word_projection."),
    (_LABEL_EMBED, "decoder.label_embed"),
    ("reweight_scale", "decoder.reweight_scale"),
    ("tagging_head.encoder.layer.", "decoder.layers."),
    ("fc.", "classifier."),
)
_LAYER_TO_MODEL: tuple[tuple[str, str], ...] = (
    ("crossattention.self.query.", "q_proj."),
    ("crossattention.self.key.", "k_proj."),
    ("crossattention.self.value.", "v_proj."),
    ("crossattention.output.dense.", "o_proj."),
    ("crossattention.output.LayerNorm.", "attention_norm."),
    ("intermediate.dense.", "fc1."),
    ("output.dense.", "fc2."),
    ("output.LayerNorm.", "output_norm."),
)
_DROPS: tuple[tuple[str, str], ...] = (
    (r"visual_encoder\..*\.(relative_position_index|attn_mask)$", "buffer, computed from the config"),
    (r"tagging_head\.embeddings\.", "not used: tags enter as embeddings of their descriptions"),
    (r"tagging_head\.encoder\.layer\.\d+\.attention\.", "not used: tags do not attend to each other"),
    (r"tagging_head\.(.*\.)?pooler\.", "not used: every tag has an output of its own"),
)
_OLD_NAME = "vision_multi"  # of `tagging_head`, in older checkpoints

_SWIN_KEYS = ("image_res", "window_size", "embed_dim", "depths", "num_heads")
_DECODER_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_OPTIONAL_DECODER_KEYS = (
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "initializer_range",
)


@dataclass
class _Checkpoint:
    """Tensors of an original checkpoint by their names in it, and descriptions of the other entries of the file."""

    path: Path
    tensors: dict[str, LazyTensor]
    not_read: dict[str, str] = field(default_factory=dict)


def recognizes(path: Path) -> str | None:
    """Recognize a RAM++ checkpoint by the name of its description embeddings."""
    is_ours = path.is_file() and _LABEL_EMBED in (tensor_names(path) or [])
    return RAM_PLUS.title if is_ours else None


def find(paths: Iterable[PurePosixPath]) -> set[PurePosixPath]:
    """Pick `.pth` files."""
    return {path for path in paths if path.suffix in _ENDINGS}


def gather(path: Path, options: Mapping[str, Any], trust_pickle: bool, scratch: Path) -> Gathered:
    """Collect a checkpoint, its tags and their thresholds."""
    with ExitStack() as downloads:
        texts = Path(downloads.enter_context(tempfile.TemporaryDirectory()))
        tag_file = _text_file(options["tag_list"], "tag_list", texts)
        threshold_file = _text_file(options["thresholds"], "thresholds", texts)
        tags = _read_tags(tag_file)
        limits = _read_thresholds(threshold_file, len(tags))
        swin_config, decoder_config = options.get("swin_config"), options.get("decoder_config")
        sizes = _read_swin_config(swin_config) | _read_decoder_config(decoder_config)
        opened = _read_checkpoint(_existing(path, "checkpoint"), trust_pickle)
        config = _build_config(sizes, tags, limits, opened)
        tensors, dropped = _rename(opened, config)
        files = {
            "checkpoint": opened.path,
            "tag_list": tag_file,
            "thresholds": threshold_file,
            "swin_config": swin_config,
            "decoder_config": decoder_config,
        }
        tensors.files = {name: [Path(file)] for name, file in files.items() if file is not None}
        main = tensors.used.get("image_projection.weight")
        return Gathered(
            tensors=tensors,
            config=config,
            dtype=main.dtype if main is not None else torch.float32,  # without it, the conversion is refused
            processor=RamPlusImageProcessor(size={"height": config.image_size, "width": config.image_size}),
            report=_report(opened, config, len(limits), dropped),
            resources=downloads.pop_all(),
        )


def _text_file(source: str | Path, argument: str, folder: Path) -> Path:
    """Return the path of a text file; a URL is downloaded into the folder."""
    if not str(source).startswith(("https://", "http://")):
        return _existing(source, argument)
    path = folder / argument / (PurePosixPath(urlsplit(str(source)).path).name or "file")
    path.parent.mkdir()
    try:
        with urlopen(str(source), timeout=_URL_SECONDS) as reply:
            content = reply.read(_MAX_TEXT_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise ConversionError(f"`{argument}`: {source} cannot be downloaded ({one_line(error)}).") from error
    if len(content) > _MAX_TEXT_BYTES:
        raise ConversionError(f"`{argument}`: {source} is too large for a text of one line per tag.")
    path.write_bytes(content)
    return path


def _existing(path: str | Path, argument: str) -> Path:
    if not Path(path).is_file():
        raise ConversionError(f"`{argument}` must be a file, but there is no file {path}.")
    return Path(path)


def _read_lines(path: Path, argument: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConversionError(f"`{argument}` must be UTF-8 text, but {path} is not ({error}).") from error
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if not lines or blank:
        found = f"line {blank[0]} is blank" if blank else "it is empty"
        raise ConversionError(f"`{argument}` must hold one entry per line, but in {path} {found}.")
    return lines


def _read_tags(path: Path) -> list[str]:
    return [line.strip() for line in _read_lines(path, "tag_list")]


def _read_thresholds(path: Path, num_tags: int) -> list[float]:
    lines = _read_lines(path, "thresholds")
    if len(lines) > num_tags:
        raise ConversionError(
            f"`thresholds` must have at most one line for each tag, but {path} has {len(lines)} lines and the tag "
            f"list has {num_tags} tags. Is it the file of another tag list?"
        )
    limits = []
    for number, line in enumerate(lines, start=1):
        try:
            limit = float(line)
        except ValueError:
            limit = math.nan
        if not 0 <= limit <= 1:
            raise ConversionError(
                f"`thresholds` must hold numbers from 0 to 1, but line {number} of {path} is {line!r}."
            )
        limits.append(limit)
    return limits


def _read_json(path: str | Path, argument: str, required: tuple[str, ...]) -> dict[str, Any]:
    path = _existing(path, argument)
    content = read_json(path, argument)
    missing = [key for key in required if key not in content]
    if missing:
        raise ConversionError(f"`{argument}` must hold {', '.join(required)}, but {path} lacks {', '.join(missing)}.")
    return content


def _read_swin_config(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    content = _read_json(path, "swin_config", _SWIN_KEYS)
    return {("image_size" if key == "image_res" else key): content[key] for key in _SWIN_KEYS}


def _read_decoder_config(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    content = _read_json(path, "decoder_config", _DECODER_KEYS)
    # The original overwrites `encoder_width` with the width of `label_embed`.
    return {key: content[key] for key in (*_DECODER_KEYS, *_OPTIONAL_DECODER_KEYS) if key in content}


def _read_checkpoint(path: Path, trust_pickle: bool) -> _Checkpoint:
    content = open_torch_file(path, trust_pickle)
    not_read: dict[str, str] = {}
    if isinstance(content, dict) and isinstance(content.get(_MODEL), dict):
        not_read = {str(key): _summary(value) for key, value in content.items() if key != _MODEL}
        content = content[_MODEL]
    tensors = tensors_of(content, path)
    if _LABEL_EMBED not in tensors or len(tensors[_LABEL_EMBED].shape) != 2:
        raise ConversionError(
            f"{path} is not a RAM++ checkpoint: it has no matrix {_LABEL_EMBED}. It has {len(tensors)} tensors, such "
            f"as {', '.join(list(tensors)[:5])}."
        )
    return _Checkpoint(path, tensors, not_read)


def _summary(value: Any) -> str:
    """Describe an entry of the file for the report."""
    tensors, pending, seen = [], [value], set()
    while pending:
        entry = pending.pop()
        if id(entry) in seen:
            continue
        seen.add(id(entry))
        if isinstance(entry, StoredTensor):
            tensors.append(entry)
        elif isinstance(entry, dict):
            pending += entry.values()
        elif isinstance(entry, list | tuple):
            pending += entry
    if not tensors:
        return type(value).__name__
    return f"{type(value).__name__} with {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors)} bytes"


def _build_config(sizes: dict[str, Any], tags: list[str], limits: list[float], opened: _Checkpoint) -> RamPlusConfig:
    rows, width = opened.tensors[_LABEL_EMBED].shape
    if not rows or rows % len(tags):
        raise ConversionError(
            f"The tag list and the checkpoint do not belong together: the list has {len(tags)} tags, and "
            f"{_LABEL_EMBED} of {opened.path} has {rows} rows, which is not a multiple of it. Pass the list that the "
            "model was trained with."
        )
    try:
        return RamPlusConfig(
            **sizes,
            projection_dim=width,
            num_descriptions=rows // len(tags),
            id2label=dict(enumerate(tags)),
            thresholds=limits + [DEFAULT_TAG_THRESHOLD] * (len(tags) - len(limits)),
            architectures=["RamPlusForImageTagging"],
        )
    except Exception as error:  # a config may be wrong in many ways
        # huggingface_hub wraps the errors of a config's validation.
        raise ConversionError(f"No model has these sizes: {one_line(error.__cause__ or error)}") from error


def _rename(opened: _Checkpoint, config: RamPlusConfig) -> tuple[GatheredTensors, dict[str, list[str]]]:
    """Rename all tensors, except for those that are dropped, which are listed by reason."""
    tensors = GatheredTensors()
    dropped: dict[str, list[str]] = {}
    for own_name, tensor in opened.tensors.items():
        name = own_name.replace(_OLD_NAME, "tagging_head")
        reason = drop_reason(name, _DROPS)
        if reason is not None:
            dropped.setdefault(reason, []).append(own_name)
            continue
        new_name = _to_model(name)
        if new_name is None or new_name in tensors.used:
            twice = " (a second one)" if new_name in tensors.used else ""
            tensors.unexpected.append(f"{own_name} {tensor.shape}{twice}")
        else:
            tensors.used[new_name] = tensor
    label_embed, shape = "decoder.label_embed", (len(config.id2label), config.num_descriptions, config.projection_dim)
    tensors.used[label_embed] = _reshaped(tensors.used[label_embed], shape)
    tensors.kept = set(tensors.used)
    return tensors, dropped


def _to_model(name: str) -> str | None:
    """Return the model's name of a parameter; `None` if no rule fits."""
    new_name = rename(name, _TO_MODEL)
    layer = re.match(r"(decoder\.layers\.\d+\.)(.*)", new_name or "")
    if layer is None:
        return new_name
    part = rename(layer[2], _LAYER_TO_MODEL)
    return None if part is None else layer[1] + part


def _reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, tensor.dtype, f"{tensor.origin} as {shape}", lambda: tensor.load().reshape(shape))


def _report(
    opened: _Checkpoint, config: RamPlusConfig, num_thresholds: int, dropped: Mapping[str, list[str]]
) -> dict[str, Any]:
    return {
        "checkpoint": {"keys": list(opened.tensors), "not_read": opened.not_read},
        "tags": {
            "count": len(config.id2label),
            "descriptions_per_tag": config.num_descriptions,
            "thresholds_from_file": num_thresholds,
            "thresholds_by_default": len(config.thresholds) - num_thresholds,
        },
        "dropped": dict(dropped),
    }


RAM_PLUS = SourceFormat(
    title="a RAM++ checkpoint",
    model_type=RamPlusConfig.model_type,
    looked_for=f"a .pth file with the matrix {_LABEL_EMBED}",
    recognizes=recognizes,
    find=find,
    patterns=tuple(f"*{ending}" for ending in _ENDINGS),
    gather=gather,
    problem="The checkpoint does not match the model. Is it complete, and are `swin_config` and `decoder_config` (or "
    "the released sizes, without them) those that it was trained with?",
    needs=("tag_list", "thresholds"),
    takes=("swin_config", "decoder_config"),
    convert="convert_ram_plus",
)

__all__ = ["RAM_PLUS", "TAG_LIST_URL", "THRESHOLDS_URL"]
