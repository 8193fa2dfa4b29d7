"""XTuner checkpoints of MG-LLaVA (fine-tuned, pretrain-stage or LoRA), completed with the models they start from."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mgllava.conversion.detect import tensor_names
from mgllava.conversion.lora import merge_lora
from mgllava.conversion.parts import (
    Source,
    clip_weights,
    dtype_of_other_tensors,
    language_model_weights,
    model_drop_reason,
    rename,
)
from mgllava.conversion.source_format import Gathered, GatheredTensors, SourceFormat
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.sources import clip_config, language_model_config
from mgllava.model_files.vocabulary import generation_config, load_tokenizer, plan_vocabulary
from mgllava.modeling import MGLlavaConfig
from mgllava.processing import CHAT_TEMPLATES
from mgllava.processing.text_chunks_common import IMAGE_TOKEN, VIDEO_TOKEN

from .checkpoint_reader import XTunerCheckpoint, read_checkpoint
from .config_mapping import build_config, read_image_size
from .export import export_xtuner
from .key_mapping import XTUNER_TO_MODEL, XTUNER_TOWERS_TO_MODEL, to_xtuner
from .lora import lora_scaling, split_lora
from .open_clip import open_high_res_tower
from .presets import PRESETS
from .processor import make_processor

_EMBEDDING = "model.language_model.embed_tokens.weight"
_PREFIXES = tuple(prefix for prefix, _ in (("llm.", ""), *XTUNER_TO_MODEL, *XTUNER_TOWERS_TO_MODEL))
_ENDINGS = (".pth", ".pt")
_ZERO_ENDINGS = ("_model_states.pt", "_optim_states.pt")
_CONFIG_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def recognizes(path: Path) -> str | None:
    """Recognize an XTuner checkpoint by the names of its tensors, or of the files of DeepSpeed."""
    if path.is_dir():
        is_zero = (path / "latest").is_file() or any(path.glob(f"*{_ZERO_ENDINGS[0]}"))
        return "a DeepSpeed checkpoint of XTuner" if is_zero else None
    names = tensor_names(path) or []
    # `state_dict` is in the names if it is not a dict: a damaged XTuner checkpoint, which its reader reports.
    is_ours = any(name.startswith(_PREFIXES) or name == "state_dict" for name in names)
    return XTUNER.title if is_ours else None


def find(paths: Iterable[PurePosixPath]) -> set[PurePosixPath]:
    """Pick `.pth` files and the folders of DeepSpeed."""
    paths = list(paths)
    folders = {path.parent for path in paths if path.name.endswith(_ZERO_ENDINGS)}
    return folders | {path for path in paths if path.suffix in _ENDINGS and path.parent not in folders}


def hint(options: Mapping[str, Any]) -> str:
    """Name the preset with the same language model, to choose among several checkpoints."""
    return next((name for name, preset in PRESETS.items() if preset["llm"] == str(options.get("llm"))), "")


def gather(path: Path, options: Mapping[str, Any], trust_pickle: bool, scratch: Path) -> Gathered:
    """Collect a checkpoint and the parts that it was trained from."""
    prompt_template = options["prompt_template"]
    if prompt_template not in CHAT_TEMPLATES:
        raise ConversionError(f"`prompt_template` must be one of {sorted(CHAT_TEMPLATES)}, got {prompt_template!r}.")
    checkpoint = read_checkpoint(path, trust_pickle, scratch)
    text_config, llm_folder = language_model_config(options["llm"])
    vision_config, image_settings = clip_config(options["vision_tower"])
    tower = open_high_res_tower(options["high_res_tower"])

    tensors = GatheredTensors(files={"checkpoint": checkpoint.files, "llm": []})
    kind, scaling = _gather_language_model(tensors, checkpoint, options["llm"], options.get("lora_alpha"))
    _gather_tower(tensors, checkpoint, "vision_tower", "model.vision_tower.", clip_weights(options["vision_tower"]))
    _gather_tower(tensors, checkpoint, "high_res_tower", "model.high_res_vision_tower.", tower.source)
    _gather_rest(tensors, checkpoint)
    for name in list(tensors.used):
        if (reason := model_drop_reason(name, vision_config.num_hidden_layers - 1)) is not None:
            tensors.drop("renamed", name, reason)
            del tensors.used[name]
    tensors.files["llm"] += [llm_folder / name for name in _CONFIG_FILES if (llm_folder / name).is_file()]

    tokenizer = load_tokenizer(llm_folder, placeholders=(IMAGE_TOKEN, VIDEO_TOKEN))
    image_token_id, video_token_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VIDEO_TOKEN])
    vocabulary = plan_vocabulary(image_token_id, _table_rows(tensors, checkpoint), video_token_id)
    image_size = read_image_size(checkpoint.config_text)
    config = build_config(checkpoint.tensors, text_config, vision_config, tower, vocabulary, image_size)
    return Gathered(
        tensors=tensors,
        config=config,
        dtype=dtype_of_other_tensors(text_config, tensors.used[_EMBEDDING].dtype, is_whole=kind == "sft"),
        processor=make_processor(config, tokenizer, image_settings, prompt_template),
        generation_config=generation_config(
            llm_folder, text_config, tokenizer, prompt_template, config.unused_token_ids
        ),
        vocabulary=vocabulary,
        report={
            "checkpoint": {
                "kind": kind,
                "meta": {name: value for name, value in checkpoint.meta.items() if _is_plain(value)},
                "lora_scaling": scaling,
                "keys": list(checkpoint.tensors),
            },
            "variant": {
                "fusion_type": config.fusion_type,
                "object_merging": config.object_merging,
                "box_feature_type": config.box_feature_type,
            },
            "vocabulary": vars(vocabulary),
        },
    )


def _gather_language_model(
    tensors: GatheredTensors, checkpoint: XTunerCheckpoint, llm: str | Path, lora_alpha: float | None
) -> tuple[str, float | None]:
    """Use the checkpoint's language model, completed from `llm`; return the kind of checkpoint and LoRA's scaling.

    The kind is "sft" (the checkpoint holds the language model), "pretrain" (it does not) or "lora".
    """
    lora = split_lora({name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("llm.")})
    kind = "lora" if lora.factors else "sft" if lora.plain else "pretrain"
    if lora_alpha is not None and kind != "lora":
        raise ConversionError(
            f"`lora_alpha` is for LoRA checkpoints, and {checkpoint.path} holds no LoRA weights. Leave it out."
        )
    for name, reason in lora.dropped.items():
        tensors.drop("checkpoint", name, reason)
    plain: dict[str, LazyTensor] = {}
    for name, tensor in lora.plain.items():
        if (new_name := rename(name, XTUNER_TO_MODEL)) is None:
            tensors.unexpected.append(f"language model: {name} {tensor.shape}")
        else:
            plain[new_name] = tensor
    if kind == "pretrain" or (kind == "lora" and not lora.has_base):
        tensors.use(language_model_weights(llm), "llm", plain, "replaced by the checkpoint's own")
    tensors.used |= plain
    tensors.kept |= plain.keys()
    scaling = None
    for name, factors in lora.factors.items():
        new_name = rename(name, XTUNER_TO_MODEL) or ""
        if new_name not in tensors.used or len(factors) != 2:
            lost = "base weight" if new_name not in tensors.used else "other factor"
            tensors.unexpected += [f"checkpoint: {one.origin} (its {lost} is missing)" for one in factors.values()]
            continue
        scaling = lora_scaling(lora_alpha, next(iter(factors["A"].shape), 0), checkpoint.config_text)
        tensors.used[new_name] = merge_lora(tensors.used[new_name], factors["A"], factors["B"], scaling)
        tensors.kept.discard(new_name)
    return kind, scaling


def _gather_tower(
    tensors: GatheredTensors, checkpoint: XTunerCheckpoint, argument: str, prefix: str, source: Source
) -> None:
    """Use the tower of the checkpoint or, if it has none, the one of the source."""
    own: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        new_name = rename(name, XTUNER_TOWERS_TO_MODEL)
        if new_name is not None and new_name.startswith(prefix):
            own[new_name] = tensor
    # Trained and untrained weights are not mixed in a tower: missing ones are reported.
    tensors.use(source, argument, source.tensors if own else (), "the checkpoint has this tower itself")
    if own:
        tensors.files[argument] = []
    tensors.used |= own
    tensors.kept |= own.keys()


def _gather_rest(tensors: GatheredTensors, checkpoint: XTunerCheckpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("llm.") or rename(name, XTUNER_TOWERS_TO_MODEL) is not None:
            continue
        new_name = rename(name, XTUNER_TO_MODEL)
        if new_name is None:
            tensors.unexpected.append(f"checkpoint: {name} {tensor.shape}")
        else:
            tensors.used[new_name] = tensor
            tensors.kept.add(new_name)


def _table_rows(tensors: GatheredTensors, checkpoint: XTunerCheckpoint) -> int:
    if _EMBEDDING not in tensors.used:
        raise ConversionError(
            f"The embedding table {to_xtuner(_EMBEDDING)} is missing (missing: 1 at least). {checkpoint.path} holds "
            f"{sum(name.startswith('llm.') for name in checkpoint.tensors)} tensors of the language model: "
            "is the checkpoint complete?"
        )
    shape = tensors.used[_EMBEDDING].shape
    if len(shape) != 2 or not shape[0]:
        raise ConversionError(f"The embedding table {to_xtuner(_EMBEDDING)} must be a matrix, got shape {shape}.")
    return shape[0]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


XTUNER = SourceFormat(
    title="an XTuner checkpoint of MG-LLaVA",
    model_type=MGLlavaConfig.model_type,
    looked_for="a .pth file with tensors such as llm.*, projector.* and bbox_projector.*, or a folder of DeepSpeed "
    "with *_model_states.pt",
    recognizes=recognizes,
    find=find,
    patterns=tuple(f"*{ending}" for ending in _ENDINGS),
    gather=gather,
    problem="The sources do not match the model. Is the checkpoint complete, and are the language model and both "
    "towers the ones that it was trained with?",
    needs=("llm", "vision_tower", "high_res_tower", "prompt_template"),
    takes=("lora_alpha",),
    advice="`mgllava.conversion.PRESETS` (of the command: `preset`) has them for the models of the paper.",
    hint=hint,
    presets=PRESETS,
    export=export_xtuner,
)

__all__ = ["XTUNER"]
