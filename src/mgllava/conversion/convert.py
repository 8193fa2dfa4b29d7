"""From an XTuner checkpoint and the repositories it was trained from to one MG-LLaVA repository."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from mgllava.model_files.errors import ConversionError
from mgllava.model_files.json_files import write_json
from mgllava.model_files.processors import make_processor
from mgllava.model_files.repository_writer import (
    DEFAULT_SHARD_SIZE,
    FLOAT_DTYPES,
    REPORT_NAME,
    Progress,
    check_dtype,
    describe_run,
    digest_sources,
    match_tensors,
    write_weights,
)
from mgllava.model_files.shard_writer import plan_shards
from mgllava.model_files.sources import clip_config, language_model_config, one_line
from mgllava.model_files.staging import StagingFolder
from mgllava.model_files.tensor_files import LazyTensor
from mgllava.model_files.vocabulary import Vocabulary, generation_config, grow_table, load_tokenizer, plan_vocabulary
from mgllava.modeling import MGLlavaConfig, MGLlavaForConditionalGeneration
from mgllava.processing import CHAT_TEMPLATES

from .checkpoint_reader import XTunerCheckpoint, read_checkpoint
from .config_mapping import build_config, read_image_size
from .key_mapping import XTUNER_TO_MODEL, XTUNER_TOWERS_TO_MODEL, model_drop_reason, rename, to_xtuner
from .lora import check_lora_alpha, lora_scaling, merge_lora, split_lora
from .presets import PRESETS
from .sources import Source, clip_weights, fetch_checkpoint, language_model_weights, open_high_res_tower

_EMBEDDING = "model.language_model.embed_tokens.weight"
_TABLES = (_EMBEDDING, "lm_head.weight", "lm_head.bias")


@dataclass
class _Gathered:
    """Tensors of all sources under the model's names.

    `kind` is "sft" (the checkpoint holds the language model), "pretrain" (it does not) or "lora". `kept` names the
    tensors that are the checkpoint's own and so keep their dtype.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    dropped: dict[str, dict[str, str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=dict)
    kind: str = "sft"
    scaling: float | None = None

    def drop(self, source: str, name: str, reason: str) -> None:
        self.dropped.setdefault(source, {})[name] = reason


def convert_checkpoint(
    checkpoint: str | Path,
    llm: str | Path,
    vision_tower: str | Path,
    high_res_tower: str | Path,
    prompt_template: str,
    output: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    trust_pickle: bool = False,
    lora_alpha: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert an XTuner checkpoint of MG-LLaVA into a repository that `from_pretrained` reads.

    Weights are streamed: one tensor is in memory at a time. The output appears under its name only when it is
    complete; an interrupted run leaves `OUTPUT.incomplete`, which the same command continues.

    Args:
        checkpoint (`str` or `Path`): An mmengine `.pth` file or a DeepSpeed ZeRO folder; fine-tuned, pretrain-stage
            or LoRA. Towers in it (saved with frozen parameters) are used instead of the repositories'. A Hub id will
            do as well: `owner/name`, or `owner/name/path` if the repository has several.
        llm (`str` or `Path`): Folder or Hub id of the language model. [`PRESETS`] has this and the next three for the
            published models. It gives tokenizer, config, and for pretrain-stage and LoRA checkpoints the weights.
        vision_tower (`str` or `Path`): Folder or Hub id of the CLIP model.
        high_res_tower (`str` or `Path`): Folder, Hub id or open_clip name of the ConvNeXt CLIP.
        prompt_template (`str`): `"vicuna"`, `"llama3"`, `"phi3"` or `"yi"`.
        output (`str` or `Path`): Folder to write.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): Dtype of all weights. `"auto"`: tensors of
            the checkpoint keep theirs, all others get the language model's.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Size of the largest weight file.
        trust_pickle (`bool`, *optional*, defaults to `False`): Read checkpoints that hold pickled objects beside the
            weights. The objects are skipped, and no code of theirs is run, even then.
        lora_alpha (`float`, *optional*): `lora_alpha` of a LoRA checkpoint whose config text does not say it.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an MG-LLaVA repository at `output`. Files there
            that no conversion writes stay, and so does the processor's box detector.
        progress (`Callable[[str, int, int], None]`, *optional*): Told the stage, bytes just done, bytes in total.

    Returns:
        `Path`: The output.

    Raises:
        ConversionError: If anything is missing, damaged, left over, of the wrong shape, or in the way.
        ValueError: If the language model's tokenizer cannot hold the placeholder.
    """
    if prompt_template not in CHAT_TEMPLATES:
        raise ConversionError(f"`prompt_template` must be one of {sorted(CHAT_TEMPLATES)}, got {prompt_template!r}.")
    check_lora_alpha(lora_alpha)
    check_dtype(dtype)
    output = Path(output).absolute()
    progress = progress or (lambda stage, done, total: None)
    with StagingFolder(output, overwrite, MGLlavaConfig.model_type) as staging:
        # Beside the output there has to be room anyway, while the system's temporary folder may lie in memory.
        scratch = staging.output.parent
        found = fetch_checkpoint(checkpoint, _preset_of(llm))
        opened = read_checkpoint(found, trust_pickle, scratch)
        text_config, llm_folder = language_model_config(llm)
        vision_config, image_settings = clip_config(vision_tower)
        tower = open_high_res_tower(high_res_tower)

        gathered = _Gathered()
        _gather_language_model(gathered, opened, llm, lora_alpha)
        _gather_tower(gathered, opened, "vision_tower", lambda: clip_weights(vision_tower))
        _gather_tower(gathered, opened, "high_res_vision_tower", lambda: tower.source)
        _gather_rest(gathered, opened)
        _drop_unused(gathered, vision_config.num_hidden_layers - 1)

        tokenizer = load_tokenizer(llm_folder)
        vocabulary = plan_vocabulary(tokenizer, _table_rows(gathered, opened))
        config = build_config(
            opened.tensors, text_config, vision_config, tower, vocabulary, read_image_size(opened.config_text)
        )
        main_dtype = _main_dtype(dtype, gathered, text_config)
        _set_dtype(config, main_dtype)
        tensors = _account(gathered, config, vocabulary)
        keep = gathered.kept if dtype == "auto" else set()
        tensors = {name: tensor if name in keep else tensor.to(main_dtype) for name, tensor in tensors.items()}

        # All that may be wrong with the small files is found before the large ones are written.
        generation = generation_config(llm_folder, text_config, tokenizer, prompt_template, config.unused_token_ids)
        processor = make_processor(config, tokenizer, image_settings, prompt_template)
        plan = plan_shards(tensors, max_shard_size)
        names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        llm_files = [llm_folder / name for name in names if (llm_folder / name).is_file()]
        sources = {"checkpoint": opened.files, **gathered.files, "llm": [*gathered.files.get("llm", []), *llm_files]}
        digests = digest_sources(sources, staging, progress)
        write_weights(staging, plan, digests, progress)

        config.save_pretrained(staging.path)
        # Saving a model would copy its code; here is none, only its class.
        custom_object_save(MGLlavaForConditionalGeneration, staging.path)
        generation.save_pretrained(staging.path)
        processor.save_pretrained(staging.path)
        _keep_box_detector(staging)
        given: dict[str, Any] = {
            "checkpoint": checkpoint,
            "llm": llm,
            "vision_tower": vision_tower,
            "high_res_tower": high_res_tower,
            "prompt_template": prompt_template,
            "dtype": dtype,
            "max_shard_size": max_shard_size,
            "trust_pickle": trust_pickle,
            "lora_alpha": lora_alpha,
        }
        run = describe_run(given, ("mgllava", "torch", "transformers"), sources, digests, tensors, plan)
        write_json(staging.path / REPORT_NAME, run | _report(opened, gathered, config, vocabulary))
        staging.publish()
    return output


def _preset_of(llm: str | Path) -> str:
    """Name the published model that has a language model, to find it among others in one repository."""
    return next((name for name, preset in PRESETS.items() if preset["llm"] == str(llm)), "")


def _gather_language_model(
    gathered: _Gathered, checkpoint: XTunerCheckpoint, llm: str | Path, lora_alpha: float | None
) -> None:
    lora = split_lora({name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("llm.")})
    for name, reason in lora.dropped.items():
        gathered.drop("checkpoint", name, reason)
    state: dict[str, LazyTensor] = {}
    if lora_alpha is not None and not lora.factors:
        raise ConversionError(
            f"`lora_alpha` is for LoRA checkpoints, and {checkpoint.path} holds no LoRA weights. Leave it out."
        )
    if lora.factors:
        gathered.kind = "lora"
    elif not lora.plain:
        gathered.kind = "pretrain"
    if gathered.kind == "pretrain" or (gathered.kind == "lora" and not lora.has_base):
        state, gathered.files["llm"] = language_model_weights(llm)
        for name in sorted(state.keys() & lora.plain.keys()):
            gathered.drop("llm", name.removeprefix("llm."), "replaced by the checkpoint's own")
    state |= lora.plain
    for name, factors in lora.factors.items():
        if name not in state or len(factors) != 2:
            lost = "base weight" if name not in state else "other factor"
            gathered.unexpected += [
                f"checkpoint: {factor.origin} (its {lost} is missing)" for factor in factors.values()
            ]
            continue
        scaling = lora_scaling(lora_alpha, next(iter(factors["A"].shape), 0), checkpoint.config_text)
        gathered.scaling = scaling
        state[name] = merge_lora(state[name], factors["A"], factors["B"], scaling)
    for name, tensor in state.items():
        new_name = rename(name, XTUNER_TO_MODEL)
        if new_name is None:
            gathered.unexpected.append(f"language model: {name} {tensor.shape}")
            continue
        gathered.tensors[new_name] = tensor
        if name in lora.plain and name not in lora.factors:
            gathered.kept.add(new_name)


def _gather_tower(
    gathered: _Gathered, checkpoint: XTunerCheckpoint, module: str, open_source: Callable[[], Source]
) -> None:
    prefix = f"model.{module}."
    own: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        new_name = rename(name, XTUNER_TOWERS_TO_MODEL)
        if new_name is not None and new_name.startswith(prefix):
            own[new_name] = tensor
    argument = module.replace("_vision", "") if module.startswith("high") else module
    source = open_source()
    gathered.files[argument] = [] if own else source.files
    for name, reason in source.dropped.items():
        gathered.drop(argument, name, reason)
    gathered.unexpected += [f"{argument}: {name}" for name in source.unexpected]
    if own:
        # All or nothing: a half that was trained and a half that was not make no tower.
        for name in source.tensors:
            gathered.drop(argument, name, "the checkpoint has this tower itself")
    gathered.tensors |= own or source.tensors
    gathered.kept |= own.keys()


def _gather_rest(gathered: _Gathered, checkpoint: XTunerCheckpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("llm.") or rename(name, XTUNER_TOWERS_TO_MODEL) is not None:
            continue
        new_name = rename(name, XTUNER_TO_MODEL)
        if new_name is None:
            gathered.unexpected.append(f"checkpoint: {name} {tensor.shape}")
        else:
            gathered.tensors[new_name] = tensor
            gathered.kept.add(new_name)


def _drop_unused(gathered: _Gathered, stored_clip_layers: int) -> None:
    for name in list(gathered.tensors):
        reason = model_drop_reason(name, stored_clip_layers)
        if reason is not None:
            gathered.drop("renamed", name, reason)
            del gathered.tensors[name]


def _table_rows(gathered: _Gathered, checkpoint: XTunerCheckpoint) -> int:
    if _EMBEDDING not in gathered.tensors:
        raise ConversionError(
            f"The embedding table {to_xtuner(_EMBEDDING)} is missing (missing: 1 at least). {checkpoint.path} holds "
            f"{sum(name.startswith('llm.') for name in checkpoint.tensors)} tensors of the language model: "
            "is the checkpoint whole?"
        )
    shape = gathered.tensors[_EMBEDDING].shape
    if len(shape) != 2 or not shape[0]:
        raise ConversionError(f"The embedding table {to_xtuner(_EMBEDDING)} must be a matrix, got shape {shape}.")
    return shape[0]


def _main_dtype(dtype: str | torch.dtype, gathered: _Gathered, text_config: PreTrainedConfig) -> torch.dtype:
    if dtype == "auto":
        configured = getattr(text_config, "dtype", None)
        if gathered.kind == "sft" or configured is None:
            dtype = gathered.tensors[_EMBEDDING].dtype
            return dtype if dtype in FLOAT_DTYPES else torch.float32  # others are refused with their names
        dtype = configured
    found = check_dtype(dtype)
    assert found is not None  # not "auto"
    return found


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    for part in (config, config.text_config, config.vision_config, config.high_res_vision_config):
        part.dtype = dtype


def _account(gathered: _Gathered, config: MGLlavaConfig, vocabulary: Vocabulary) -> dict[str, LazyTensor]:
    """Check that sources and model match name by name, and give the tensors in the model's order."""
    try:
        with torch.device("meta"):
            model: Any = MGLlavaForConditionalGeneration(config)
    except Exception as error:  # a config may be wrong in many ways
        raise ConversionError(f"No model can be built from these parts: {one_line(error)}") from error
    tensors = dict(gathered.tensors)
    for name in _TABLES:
        if name in tensors and tensors[name].shape[:1] == (vocabulary.original_rows,):
            tensors[name] = grow_table(tensors[name], vocabulary.padded_rows)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, target in (model.all_tied_weights_keys or {}).items():
        expected.pop(name, None)
        if name in tensors and target in tensors:
            if not torch.equal(gathered.tensors[name].load(), gathered.tensors[target].load()):
                raise ConversionError(
                    f"The config ties {name} to {target}, but their values differ in the checkpoint. "
                    "Set tie_word_embeddings to false in the config.json of --llm."
                )
            gathered.drop("renamed", name, f"equal to {target}, which it is tied to")
            del tensors[name]

    return match_tensors(
        tensors,
        expected,
        gathered.unexpected,
        "The sources do not make up the model. Is the checkpoint whole, and are the language model and both towers "
        "the ones that it was trained with?",
    )


def _keep_box_detector(staging: StagingFolder) -> None:
    """Let the new processor have the box detector of the one that it replaces, as the files of its parts stay."""
    name, key = "processor_config.json", "box_detector_config"
    try:
        old = json.loads((staging.output / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(old, dict) and isinstance(old.get(key), dict):
        new = json.loads((staging.path / name).read_bytes())
        write_json(staging.path / name, {**new, key: old[key]})


def _report(
    checkpoint: XTunerCheckpoint, gathered: _Gathered, config: MGLlavaConfig, vocabulary: Vocabulary
) -> dict[str, Any]:
    dropped: dict[str, dict[str, list[str]]] = {}
    for source, names in gathered.dropped.items():
        for name, reason in names.items():
            dropped.setdefault(source, {}).setdefault(reason, []).append(name)
    return {
        "checkpoint": {
            "kind": gathered.kind,
            "meta": {name: value for name, value in checkpoint.meta.items() if _is_plain(value)},
            "lora_scaling": gathered.scaling,
            "keys": list(checkpoint.tensors),
        },
        "variant": {
            "fusion_type": config.fusion_type,
            "object_merging": config.object_merging,
            "box_feature_type": config.box_feature_type,
        },
        "vocabulary": {
            "image_token_id": vocabulary.image_token_id,
            "original_rows": vocabulary.original_rows,
            "padded_rows": vocabulary.padded_rows,
        },
        "dropped": dropped,
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


__all__ = ["convert_checkpoint"]
