"""Write complete model folders, which load without this package and have a model card."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from mgllava.families import FAMILIES, Family, resolve, takes_boxes
from mgllava.model_files.errors import ConversionError, one_line
from mgllava.model_files.json_files import read_json, write_json
from mgllava.model_files.shard_writer import Progress, check_disk_space
from mgllava.model_files.sources import fetch, fetch_weights, refuse_revision_of_folder
from mgllava.model_files.staging import REPORT_NAME, StagingFolder, read_model_type
from mgllava.model_files.tensor_files import open_weights
from mgllava.model_files.tensor_matching import build_on_meta, match_tensors, stored_shapes
from mgllava.processing.box_detection_mgllava import DEFAULT_DETECTOR
from mgllava.processing.box_detector_files_mgllava import BUNDLE_FOLDER, PARTS, check_links, is_bundled

from .card_sections import Contents, is_hub_id
from .model_card import CARD_MARK, CARD_NAME, model_card
from .verify import verify_loading

_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", CARD_NAME]
_INDEX = "model.safetensors.index.json"
_TEMPLATES_FOLDER = "chat_templates"
logger = logging.get_logger(__name__)
_BLOCK = 1 << 24


def export_repository(
    model: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    tagger: str | None = None,
    detector: str | None = None,
    with_detector: bool = False,
    repo_id: str | None = None,
    tag: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model folder that loads with `trust_remote_code=True` where this package is not installed.

    It holds the weights (their names and shapes are checked first), the configurations, the processor with tokenizer
    and chat template, the code of all classes, the box detector, and a model card. Weights are copied, not loaded, and
    not linked: saving over a link would change the original. The output gets its name when it is complete.

    Args:
        model (`str` or `Path`): Folder or Hub id of a model of this package.
        output (`str` or `Path`): Folder to write.
        revision (`str`, *optional*): Branch, tag or commit of `model` on the Hub.
        tagger (`str`, *optional*): Tagger for the box detector, instead of the processor's: folder or Hub id.
        detector (`str`, *optional*): Object detector, instead of the processor's: folder or Hub id.
        with_detector (`bool`, *optional*, defaults to `False`): Also copy a tagger and an object detector that are
            Hub ids. Those that are folders are always copied.
        repo_id (`str`, *optional*): Name that the model repository on the Hub will have, for the card.
        tag (`str`, *optional*): Revision in the examples of the card; by default `v` and the package's version.
        verify (`bool`, *optional*, defaults to `True`): Load the result in a process that cannot import this package.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a model of the same type at `output`. Files there
            that no export writes are kept, and so is a hand-written card.
        progress (`Callable[[str, int, int], None]`, *optional*): Called with the stage, the bytes just copied and the
            bytes in total.

    Returns:
        `Path`: The output.

    Raises:
        ConversionError: If `model` is not a complete model of this package, its files name or link to something
            outside it, the result does not load, or `output` exists.
    """
    output = Path(output).absolute()
    refuse_revision_of_folder(model, revision)
    source = fetch(model, "model", [*_TEXT_FILES, "*.safetensors"], revision)
    _refuse_links(source)
    family = _read_family(source, model)
    with StagingFolder(output, overwrite, resolve(family.config).model_type) as staging:
        config = _read_config(source, family)
        shapes = stored_shapes(build_on_meta(resolve(family.model), config))
        weight_files = _check_weights(source, config, shapes)
        processor = _read_processor(source, family)
        _check_box_detector(processor, source)
        if tagger is not None or detector is not None or with_detector:
            _set_box_detector(processor, tagger, detector, with_detector)
        _pin_box_detector(processor)

        staging.keep_finished({}, [])
        check_disk_space(staging.path, sum(path.stat().st_size for path in weight_files))
        _copy_weights(source, weight_files, staging.path, progress or (lambda stage, done, total: None))
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", staging.path / "generation_config.json")
        config.save_pretrained(staging.path)
        custom_object_save(resolve(family.model), staging.path)
        try:
            processor.save_pretrained(staging.path)
        except ValueError as error:  # a link that leads out of a folder of the box detector
            raise ConversionError(f"The processor cannot be saved: {error}") from error
        for part in sorted((staging.path / BUNDLE_FOLDER).glob("*/config.json")):
            _update_code(part.parent)
        report = _read_report(source)
        if report:
            write_json(staging.path / REPORT_NAME, report)
        if verify:
            verify_loading(staging.path)
        contents = Contents(
            config,
            shapes,
            report,
            getattr(processor, "box_detector_config", None),
            repo_id or output.name,
            tag or default_tag(),
            f"transformers {transformers.__version__}" if verify else None,
        )
        _write_card(source, staging, contents)
        staging.publish()
    return output


def default_tag() -> str:
    """Return the tag for exports of the installed version."""
    import mgllava

    return f"v{mgllava.__version__}"


def _read_family(folder: Path, name: str | Path) -> Family:
    path = folder / "config.json"
    if not path.is_file():
        hint = " It is an adapter: merge it into its model and save that." * (folder / "adapter_config.json").is_file()
        raise ConversionError(
            f"`model`: {name} has no config.json, so it is not a model folder of transformers.{hint}"
        )
    model_type = read_json(path, "model").get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        *others, last = (family.title for family in FAMILIES.values())
        titles = f"{', '.join(others)} or {last}"
        raise ConversionError(f"`model` must be a model of {titles}, got {name} of type {model_type!r}.")
    return FAMILIES[model_type]


def _refuse_links(folder: Path) -> None:
    """Refuse texts that are links to files outside the folder, because they would be published."""
    for path in sorted(folder.iterdir()):
        if path.name == _TEMPLATES_FOLDER or any(path.match(pattern) for pattern in _TEXT_FILES):
            try:
                check_links(path, folder)
            except ValueError as error:
                raise ConversionError(f"`model`: {error}") from error


def _read_config(folder: Path, family: Family) -> Any:
    try:
        config = resolve(family.config).from_pretrained(folder)
    except Exception as error:  # a config may be wrong in many ways
        reason = one_line(error.__cause__ or error)
        raise ConversionError(f"config.json of {folder} cannot be read ({reason}).") from error
    # Saved models may lack `architectures`, and `auto_map` must name the code that is written here.
    config.architectures, config.auto_map = [resolve(family.model).__name__], None
    return config


def _check_weights(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Path]:
    """Check that the weight files hold what their index names and what the model needs; return the files."""
    tensors, files = open_weights(folder)
    pickled = [path.name for path in files if path.suffix != ".safetensors"]
    if pickled:
        raise ConversionError(
            f"{folder} must hold safetensors, got {', '.join(pickled)}. Load the model and save it with "
            "`save_pretrained`, which writes them."
        )
    if getattr(config, "quantization_config", None) is None:  # else names and shapes are the quantizer's
        match_tensors(tensors, shapes, [], f"The weights in {folder} are not those of its config.json.")
    return files


def _processor_class(family: Family) -> Any:
    """Return the class of the processor or, without one, of the image processor."""
    return resolve(family.processor or family.image_processors["torchvision"])


def _read_processor(folder: Path, family: Family) -> Any:
    try:
        return _processor_class(family).from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ConversionError(
            f"{folder} must hold the model's processor, but it cannot be loaded ({error}). "
            "Save the processor there with `save_pretrained`."
        ) from error


def _check_box_detector(processor: Any, source: Path) -> None:
    """Refuse a box detector outside the model folder, before anything is written."""
    try:
        if takes_boxes(processor):
            processor.locate_box_detector()
    except (ValueError, OSError) as error:
        raise ConversionError(f"The box detector that {source} names cannot be exported: {error}") from error


def _pin_box_detector(processor: Any) -> None:
    """Save the commits of the parts that stay on the Hub."""
    config = dict(getattr(processor, "box_detector_config", None) or {})
    for part in PARTS:
        name, key = config.get(part), f"{part}_revision"
        if not isinstance(name, str) or is_bundled(name) or os.path.isdir(name):
            continue
        try:
            config[key] = HfApi().model_info(name, revision=config.get(key)).sha
        except RepositoryNotFoundError as error:
            raise ConversionError(f"`{part}` must be a folder or a repository on the Hub: {error}") from error
        except Exception:  # offline, reported by errors of several HTTP libraries
            logger.warning(
                f"The Hub cannot be asked for the commit of {name}, the {part} of the box detector: it is taken from "
                "the local cache or, if the cache has none, not saved."
            )
        else:
            processor.box_detector_config = config


def _set_box_detector(processor: Any, tagger: str | None, detector: str | None, with_detector: bool) -> None:
    """Set tagger and detector in the processor's configuration; with `with_detector` as folders on this disk."""
    if not takes_boxes(processor):
        raise ConversionError(
            "`tagger`, `detector` and `with_detector` are for models whose processor finds boxes, which "
            f"{type(processor).__name__} does not."
        )
    given = {name: value for name, value in (("tagger", tagger), ("detector", detector)) if value is not None}
    config = {
        "tagger": None,
        "detector": DEFAULT_DETECTOR,
        "mode": "faithful",
        **(processor.box_detector_config or {}),
        **given,
    }
    for name in given:
        config.pop(f"{name}_revision", None)
    if config["tagger"] is None:
        raise ConversionError(
            "`tagger` must be given, since the processor has none: a folder that `mgllava convert-ram-plus` wrote, "
            "or a Hub id."
        )
    if detector is not None:
        config.pop("prompt_embeds", None)  # of another text tower
    for name in ("tagger", "detector"):
        value = config[name]
        if name not in given and (not isinstance(value, str) or is_bundled(value)):
            continue  # a list of labels, or a folder inside the source
        if with_detector or os.path.isdir(value):
            folder = fetch_weights(value, name, _TEXT_FILES, config.pop(f"{name}_revision", None))
            config[name] = str(folder.absolute())
    processor.box_detector_config = config


def _copy_weights(source: Path, files: list[Path], target: Path, progress: Progress) -> None:
    total = sum(path.stat().st_size for path in files)
    for path in files:
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            while block := reader.read(_BLOCK):
                writer.write(block)
                progress("copying weights", len(block), total)
    if (source / _INDEX).is_file():
        shutil.copyfile(source / _INDEX, target / _INDEX)


def _update_code(folder: Path) -> None:
    """Write the installed version's code into a model folder, if the model is of this package."""
    family = FAMILIES.get(read_model_type(folder) or "")
    if family is not None:
        _read_config(folder, family).save_pretrained(folder)
        custom_object_save(resolve(family.model), folder)
        _processor_class(family).from_pretrained(folder).save_pretrained(folder)


def _read_report(folder: Path) -> dict[str, Any]:
    """Read the report of the conversion, if there is one, and cut paths down to their last names."""
    path = folder / REPORT_NAME
    if not path.is_file():
        return {}
    report = read_json(path)
    try:
        report["arguments"] = {name: _published(value) for name, value in report.get("arguments", {}).items()}
        for files in report.get("sources", {}).values():
            for file in files:
                file["file"] = Path(file["file"]).name
    except (AttributeError, TypeError, KeyError) as error:
        raise ConversionError(f"{path} is not the report of a conversion, or is damaged. Remove it.") from error
    return report


def _published(argument: Any) -> Any:
    """Return the last name of a path; Hub ids and other values are unchanged."""
    if not isinstance(argument, str):
        return argument
    is_path = Path(argument).exists() or (os.sep in argument and not is_hub_id(argument))
    return Path(argument).name if is_path else argument


def _write_card(source: Path, staging: StagingFolder, contents: Contents) -> None:
    """Generate the card, or keep a hand-written one of the source or of the output that is replaced."""
    for own in (source / CARD_NAME, staging.output / CARD_NAME):
        if own.is_file() and CARD_MARK not in own.read_text(encoding="utf-8", errors="replace"):
            shutil.copyfile(own, staging.path / CARD_NAME)
            return
    model_card(contents).save(staging.path / CARD_NAME)


__all__ = ["default_tag", "export_repository"]
