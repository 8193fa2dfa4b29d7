"""Checkpoints of SliME: whole releases, LoRA releases, and the files of the first stages of training."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedConfig

from mgllava.conversion.detect import tensor_names
from mgllava.conversion.parts import (
    LANGUAGE_MODEL_TO_MODEL,
    clip_weights,
    dtype_of_other_tensors,
    language_model_weights,
    model_drop_reason,
    rename,
)
from mgllava.conversion.source_format import Gathered, GatheredTensors, SourceFormat
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.json_files import read_json
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.sources import HUB_PREFIX, clip_config, language_model_config
from mgllava.model_files.tensor_files import open_weights, tensors_of
from mgllava.model_files.torch_files import open_torch_file
from mgllava.model_files.vocabulary import Vocabulary, generation_config, load_tokenizer, plan_vocabulary
from mgllava.modeling import SlimeConfig
from mgllava.processing import SLIME_CHAT_TEMPLATES
from mgllava.processing.text_chunks_common import IMAGE_TOKEN

from .adapter import ADAPTER_CONFIG, open_adapter
from .config_mapping import (
    HUB_ID,
    build_config,
    check_original,
    is_slime,
    read_text_config,
    slime_arguments,
    tiles_images,
    unused_fields,
)
from .export import export_slime
from .key_mapping import COMPRESSOR, VISION_TOWER, to_model
from .new_modules import add_new_modules, add_positions
from .presets import LORA_PRESETS, PRESETS
from .processor import make_processor, separator_of

logger = logging.getLogger(__name__)

_EMBEDDING = "model.language_model.embed_tokens.weight"
_TRAINABLES = "non_lora_trainables.bin"
_STAGE_FILES = ("mm_projector.bin", "sampler.bin")
# What a stage file holds, without the prefixes of wrappers.
_STAGE_NAMES = re.compile(
    r"(module\.|base_model\.model\.)*model\.(mm_projector\.(attn\.|projection\.|w_gate|w_noise|mean|std)|sampler\.)"
)
_WEIGHT_FILES = re.compile(r"(model\.safetensors|pytorch_model\.bin)(\.index\.json)?")
_TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass
class _LanguageModel:
    """What the tokenizer and the configuration of the language model are read from."""

    config: PreTrainedConfig
    folder: Path
    argument: str


def _recognizes_release(path: Path) -> str | None:
    """Recognize a folder by its configuration, unless it is that of an adapter or of stage files alone."""
    if not _has_slime_config(path) or (path / ADAPTER_CONFIG).is_file():
        return None
    has_weights = any(_WEIGHT_FILES.fullmatch(entry.name) for entry in path.iterdir())
    return SLIME.title if has_weights or not _stage_files(path) else None


def _recognizes_lora(path: Path) -> str | None:
    """Recognize a folder by the configuration of its adapter next to that of the model."""
    if not path.is_dir() or not (path / ADAPTER_CONFIG).is_file():
        return None
    is_ours = _has_slime_config(path) or (not (path / "config.json").is_file() and (path / _TRAINABLES).is_file())
    return SLIME_LORA.title if is_ours else None


def _recognizes_stage(path: Path) -> str | None:
    """Recognize a file, or a folder with such files, by the names of its tensors."""
    files = [path] if path.is_file() else _stage_files(path) if path.is_dir() else []
    found = [tensor_names(file) for file in files]
    is_ours = bool(found) and all(names and all(map(_STAGE_NAMES.match, names)) for names in found)
    return SLIME_STAGE.title if is_ours else None


def _has_slime_config(path: Path) -> bool:
    return (path / "config.json").is_file() and is_slime(read_json(path / "config.json", "checkpoint"))


def _stage_files(folder: Path) -> list[Path]:
    return [folder / name for name in _STAGE_FILES if (folder / name).is_file()]


def _outermost(folders: set[PurePosixPath]) -> set[PurePosixPath]:
    """Leave out what lies in another one, such as a vision tower or earlier states of a training."""
    return {folder for folder in folders if not any(parent in folders for parent in folder.parents)}


def _find_releases(paths: Iterable[PurePosixPath]) -> set[PurePosixPath]:
    """Pick folders with a configuration and weights."""
    names = _names_by_folder(paths)
    with_weights = {folder for folder, held in names.items() if any(map(_WEIGHT_FILES.fullmatch, held))}
    return _outermost({folder for folder in with_weights if "config.json" in names[folder]})


def _find_adapters(paths: Iterable[PurePosixPath]) -> set[PurePosixPath]:
    """Pick folders with an adapter and what was trained next to it."""
    names = _names_by_folder(paths)
    return _outermost({folder for folder, held in names.items() if held >= {ADAPTER_CONFIG, _TRAINABLES}})


def _find_stage_files(paths: Iterable[PurePosixPath]) -> set[PurePosixPath]:
    """Pick folders with stage files and without weights."""
    names = _names_by_folder(paths)
    found = {folder for folder, held in names.items() if held & set(_STAGE_FILES)}
    return found - {folder for folder in found if any(map(_WEIGHT_FILES.fullmatch, names[folder]))}


def _names_by_folder(paths: Iterable[PurePosixPath]) -> dict[PurePosixPath, set[str]]:
    names: dict[PurePosixPath, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    return names


def _gather_release(path: Path, options: Mapping[str, Any], trust_pickle: bool, scratch: Path) -> Gathered:
    """Collect a folder that holds all weights but, at most, those of CLIP."""
    original = _read_original(path)
    weights, files = open_weights(path)
    if stage_files := _stage_files(path):
        logger.warning(
            "%s: %s, a file of the first training stages, is not used, because the folder has the weights of a whole "
            "model. Pass the file itself to convert it.",
            path,
            " and ".join(file.name for file in stage_files),
        )
    tensors = GatheredTensors()
    _use_own(tensors, original, weights, files)
    language_model = _LanguageModel(read_text_config(original, path), path, "checkpoint")
    return _complete("release", path, original, tensors, language_model, options, {})


def _gather_lora(path: Path, options: Mapping[str, Any], trust_pickle: bool, scratch: Path) -> Gathered:
    """Collect an adapter, what was trained next to it, and the language model that it belongs to."""
    original = _read_original(path)
    adapter = open_adapter(path, trust_pickle)
    if not (path / _TRAINABLES).is_file():
        raise ConversionError(
            f"`checkpoint`: {path} has no {_TRAINABLES}, which holds projector and compressor. The folders that "
            "a training saves meanwhile lack it; the final one has it."
        )
    trainables = tensors_of(open_torch_file(path / _TRAINABLES, trust_pickle), path / _TRAINABLES)
    if twice := sorted(trainables.keys() & adapter.whole.keys()):
        raise ConversionError(
            f"`checkpoint`: {path} has two tensors for {twice[0]}. Remove the one that is not meant."
        )
    tensors = GatheredTensors()
    own = _use_own(tensors, original, trainables | adapter.whole, [*adapter.files, path / _TRAINABLES])

    base_config, llm_folder = language_model_config(options["llm"])
    if base_config.model_type != "llama":
        raise ConversionError(
            f"`llm` must be the Llama that the adapter was trained on, got model type {base_config.model_type!r}."
        )
    base = language_model_weights(options["llm"])
    tensors.use(base, "llm", own, "replaced by the checkpoint's own")
    originals = {base.names[name]: tensor for name, tensor in tensors.used.items() if name in base.names}
    merged, unexpected = adapter.merge(originals)
    tensors.used |= {rename(name, LANGUAGE_MODEL_TO_MODEL) or name: tensor for name, tensor in merged.items()}
    tensors.unexpected += unexpected
    # The original builds the base with the configuration of the adapter's folder, and takes the base's tokenizer.
    language_model = _LanguageModel(read_text_config(original, path), llm_folder, "llm")
    language_model.config.dtype = base_config.dtype
    settings = {
        name: adapter.settings.get(name) for name in ("r", "lora_alpha", "use_rslora", "base_model_name_or_path")
    }
    return _complete("lora", path, original, tensors, language_model, options, {"lora": settings})


def _gather_stage(path: Path, options: Mapping[str, Any], trust_pickle: bool, scratch: Path) -> Gathered:
    """Collect stage files and the models that they were trained with; new modules where there is no file."""
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else _stage_files(path)
    original: dict[str, Any] = _read_original(folder) if _has_slime_config(folder) else {}
    weights: dict[str, LazyTensor] = {}
    for file in files:
        opened = tensors_of(open_torch_file(file, trust_pickle), file)
        if twice := sorted(opened.keys() & weights.keys()):
            raise ConversionError(
                f"`checkpoint`: {file} holds tensors that another file of {folder} has, too, such as {twice[0]}. "
                "Pass one of the files instead of the folder."
            )
        weights |= opened
    tensors = GatheredTensors()
    _use_own(tensors, original, weights, files)
    text_config, llm_folder = language_model_config(options["llm"])
    tensors.use(language_model_weights(options["llm"]), "llm")
    return _complete("stage", folder, original, tensors, _LanguageModel(text_config, llm_folder, "llm"), options, {})


def _read_original(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"`checkpoint`: {folder} has no config.json.")
    original = read_json(path, "checkpoint")
    check_original(original)
    return original


def _use_own(
    tensors: GatheredTensors, original: Mapping[str, Any], weights: Mapping[str, LazyTensor], files: list[Path]
) -> set[str]:
    """Use the tensors of the checkpoint, which keep their dtype; return their names in the model."""
    own = to_model(weights, files)
    is_compressed = not original or original.get("mm_resampler_type") == "cosine"
    unused = [name for name in own.tensors if name.startswith(COMPRESSOR) and not is_compressed]
    tensors.use(own, "checkpoint", unused, f"not used: mm_resampler_type is {original.get('mm_resampler_type')!r}")
    tensors.kept |= tensors.used.keys()
    return set(tensors.used)


def _complete(
    kind: str,
    folder: Path,
    original: dict[str, Any],
    tensors: GatheredTensors,
    language_model: _LanguageModel,
    options: Mapping[str, Any],
    report: dict[str, Any],
) -> Gathered:
    """Add the vision tower, new modules, tokenizer and processor."""
    notes: list[str] = []
    tower = _vision_tower(folder, original, options["vision_tower"])
    vision_config, image_settings = clip_config(tower)
    has_tower = _use_vision_tower(tensors, tower, vision_config, original)
    tokenizer = load_tokenizer(language_model.folder, language_model.argument, original.get("pad_token_id"))
    rows = _table_rows(tensors)
    vocabulary, num_words = _plan_words(notes, tokenizer, rows)
    text_config = language_model.config
    _note_padding(notes, original, tokenizer)
    text_config.pad_token_id = tokenizer.pad_token_id
    arguments = slime_arguments(original)
    if kind == "stage" and "num_local_queries" not in arguments:
        queries = tensors.used.get(f"{COMPRESSOR}queries")
        arguments |= {} if queries is None else {"num_local_queries": next(iter(queries.shape), 0)}
    config = build_config(
        text_config,
        vision_config,
        vocabulary,
        unpadded_vocab_size=min(num_words, rows),
        separator_token_id=_separator(notes, original, tokenizer),
        **arguments,
    )
    dtype = dtype_of_other_tensors(text_config, tensors.used[_EMBEDDING].dtype, is_whole=kind == "release")
    initialized = add_new_modules(tensors, config, dtype) if kind == "stage" else []
    computed = add_positions(tensors, kind == "release")
    if original and not tiles_images(original):
        notes.append(
            f"`image_aspect_ratio` in config.json is {original.get('image_aspect_ratio')!r}, not 'anyres': the "
            "processor makes one view of an image, as the original does. Pass it `do_tile=True` for tiles."
        )
    template = _template(options["prompt_template"], tokenizer)
    _name_text_files(tensors, folder, language_model)
    for note in notes:
        logger.warning("%s", note)
    return Gathered(
        tensors=tensors,
        config=config,
        dtype=dtype,
        processor=make_processor(config, tokenizer, image_settings, template, tiles_images(original)),
        generation_config=generation_config(
            language_model.folder, text_config, tokenizer, template, config.unused_token_ids, language_model.argument
        ),
        vocabulary=vocabulary,
        report={
            "checkpoint": {
                "kind": kind,
                "config": original,
                "unused_config": unused_fields(original),
                "vision_tower": str(tower),
                "has_vision_tower": has_tower,
                "table_rows": rows,
                "used_rows": config.unpadded_vocab_size,
                "pad_token_id": tokenizer.pad_token_id,
                "prompt_template": template,
                **report,
            },
            "initialized": initialized,
            "computed": computed,
            "notes": notes,
            "vocabulary": vars(vocabulary),
        },
    )


def _use_vision_tower(
    tensors: GatheredTensors, tower: str | Path, vision_config: PreTrainedConfig, original: Mapping[str, Any]
) -> bool:
    """Use the tower's tensors unless the checkpoint has its own, as returned; drop layers that are not needed."""
    if original.get("mm_hidden_size") not in (None, vision_config.hidden_size):
        raise ConversionError(
            f"`vision_tower` is not the one of the training: {tower} is {vision_config.hidden_size} channels wide, "
            f"while `mm_hidden_size` in config.json of the checkpoint is {original['mm_hidden_size']}."
        )
    has_tower = any(name.startswith(VISION_TOWER) for name in tensors.used)
    if not has_tower:
        tensors.use(clip_weights(tower), "vision_tower")
    for name in list(tensors.used):
        if (reason := model_drop_reason(name, vision_config.num_hidden_layers - 1)) is not None:
            tensors.drop("renamed", name, reason)
            del tensors.used[name]
    return has_tower


def _plan_words(notes: list[str], tokenizer: Any, rows: int) -> tuple[Vocabulary, int]:
    """Plan the rows of the embedding table; return the plan and the number of the tokenizer's own tokens."""
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    last = max(tokenizer.get_vocab().values())
    num_words = image_token_id if image_token_id == last else last + 1
    if num_words > rows:
        notes.append(
            f"The tokenizer has {num_words} tokens and the embedding table {rows} rows. The original fills the rows "
            "of the others with random numbers; here they get the mean of the table, and are never generated."
        )
    return plan_vocabulary(image_token_id, rows), num_words


def _name_text_files(tensors: GatheredTensors, folder: Path, language_model: _LanguageModel) -> None:
    """Add to the files of each source those that configuration and tokenizer come from."""
    if folder != language_model.folder and (folder / "config.json").is_file():
        tensors.files["checkpoint"].append(folder / "config.json")
    tensors.files.setdefault(language_model.argument, []).extend(
        language_model.folder / name for name in _TEXT_FILES if (language_model.folder / name).is_file()
    )


def _vision_tower(folder: Path, original: Mapping[str, Any], given: str | Path | None) -> str | Path:
    """Find the vision tower that the user, or else the checkpoint, names."""
    if given is not None:
        return given
    name = original.get("mm_vision_tower")
    if name is None:
        raise ConversionError("`checkpoint`: it does not say what its vision tower is. Pass `vision_tower`.")
    # A string from a file that came from elsewhere: never a path out of its folder, nor one into the current folder.
    if isinstance(name, str) and name.isprintable() and name:
        inside = PurePosixPath(name)
        if not inside.is_absolute() and ".." not in inside.parts and "\\" not in name:
            found = folder / inside
            if found.is_dir() and found.resolve().is_relative_to(folder.resolve()):
                return found
        if HUB_ID.fullmatch(name) and not (folder / inside).exists():
            return HUB_PREFIX + name
    raise ConversionError(
        f"`checkpoint`: `mm_vision_tower` in its config.json must be a folder in {folder} or a Hub id (owner/name), "
        f"got {name!r}. Pass `vision_tower`."
    )


def _table_rows(tensors: GatheredTensors) -> int:
    table = tensors.used.get(_EMBEDDING)
    if table is None:
        raise ConversionError("The embedding table model.embed_tokens.weight is missing (missing: 1 at least).")
    if len(table.shape) != 2 or not table.shape[0]:
        raise ConversionError(f"The embedding table {table.origin} must be a matrix, got shape {table.shape}.")
    return table.shape[0]


def _note_padding(notes: list[str], original: Mapping[str, Any], tokenizer: Any) -> None:
    if original.get("pad_token_id") not in (None, tokenizer.pad_token_id):
        notes.append(
            f"`pad_token_id` in config.json is {original['pad_token_id']}, and the tokenizer pads with "
            f"{tokenizer.pad_token!r} ({tokenizer.pad_token_id}): the tokenizer's is used."
        )


def _separator(notes: list[str], original: Mapping[str, Any], tokenizer: Any) -> int:
    """Return the id of the separator: the checkpoint's, which the model was trained with, or the tokenizer's."""
    stored, own = original.get("seperator"), separator_of(tokenizer)
    if stored is None:
        if original:
            notes.append(f"config.json has no `seperator`: {own} is used, the tokenizer's comma.")
        return own
    if stored != own:
        notes.append(
            f"`seperator` in config.json is {stored}, and the tokenizer's comma is {own}: that of config.json is used."
        )
    return int(stored)


def _template(given: str | None, tokenizer: Any) -> str:
    """Return the name of the chat template: the user's, or that of the tokenizer's special tokens."""
    if given is None:
        return "llama3" if "<|eot_id|>" in tokenizer.get_vocab() else "v1"
    if given not in SLIME_CHAT_TEMPLATES:
        raise ConversionError(
            f"`prompt_template` must be one of {sorted(SLIME_CHAT_TEMPLATES)} for SliME, got {given!r}."
        )
    return given


SLIME = SourceFormat(
    title="a release of SliME",
    model_type=SlimeConfig.model_type,
    looked_for="a folder with a config.json of model type llava_llama and `mm_resampler_type` or `mm_learnable_gated`",
    recognizes=_recognizes_release,
    find=_find_releases,
    patterns=("*.json", "*.model", "*.safetensors", "pytorch_model*.bin"),
    told_by=("config.json", ADAPTER_CONFIG),
    gather=_gather_release,
    problem="The sources do not make up the model. Is the checkpoint whole, and the vision tower the one that it was "
    "trained with?",
    takes=("vision_tower", "prompt_template"),
    presets=PRESETS,
    export=export_slime,
)

SLIME_LORA = SourceFormat(
    title="a LoRA release of SliME",
    model_type=SlimeConfig.model_type,
    looked_for=f"a folder with {ADAPTER_CONFIG}, {_TRAINABLES} and such a config.json",
    recognizes=_recognizes_lora,
    find=_find_adapters,
    patterns=("*.json", "adapter_model*", _TRAINABLES),
    told_by=("config.json", ADAPTER_CONFIG),
    gather=_gather_lora,
    problem="The sources do not make up the model. Is the checkpoint whole, and are the language model and the vision "
    "tower the ones that it was trained with?",
    needs=("llm",),
    takes=("vision_tower", "prompt_template"),
    advice="`llm` is the model that the adapter was trained on.",
    presets=LORA_PRESETS,
)

SLIME_STAGE = SourceFormat(
    title="a file of SliME's first training stages",
    model_type=SlimeConfig.model_type,
    looked_for=f"{' or '.join(_STAGE_FILES)}, or a folder with them",
    recognizes=_recognizes_stage,
    find=_find_stage_files,
    patterns=_STAGE_FILES,
    gather=_gather_stage,
    problem="The sources do not make up the model. Is the checkpoint whole, and are the language model and the vision "
    "tower the ones that it was trained with?",
    needs=("llm",),
    takes=("vision_tower", "prompt_template"),
    advice="`llm` and `vision_tower` are the models that it was trained with.",
)

__all__ = ["SLIME", "SLIME_LORA", "SLIME_STAGE"]
