"""Update the code in the shipped model to that of the package.

    python -m small_world.refresh_code

Like every saved model, the shipped one contains its code, so that it loads where `mgllava` is not installed. Run this
after each change of `src/mgllava/modeling` or `src/mgllava/processing`; a test compares them.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.dynamic_module_utils import custom_object_save

from mgllava import (
    MGLlavaConfig,
    MGLlavaForConditionalGeneration,
    MGLlavaProcessor,
    RamPlusConfig,
    RamPlusForImageTagging,
    RamPlusImageProcessor,
)

MODEL = Path(__file__).parent / "model"


def refresh_code(model: Path) -> None:
    """Replace the code and the `auto_map` entries of a model and its tagger, and nothing else."""
    for folder, config_class, model_class, processor_class in (
        (model, MGLlavaConfig, MGLlavaForConditionalGeneration, MGLlavaProcessor),
        (model / "box_detector" / "tagger", RamPlusConfig, RamPlusForImageTagging, RamPlusImageProcessor),
    ):
        with tempfile.TemporaryDirectory() as name:
            saved = Path(name)
            config_class.from_pretrained(folder).save_pretrained(saved)
            custom_object_save(model_class, saved)
            processor_class.from_pretrained(folder).save_pretrained(saved)
            for path in folder.glob("*.py"):
                path.unlink()
            for path in saved.glob("*.py"):
                shutil.copyfile(path, folder / path.name)
            for path in folder.glob("*.json"):
                if (saved / path.name).is_file():
                    _copy_auto_map(saved / path.name, path)


def _copy_auto_map(source: Path, target: Path) -> None:
    """Copy all `auto_map` entries, nested ones too, from one JSON file to another."""
    new, old = (json.loads(path.read_text(encoding="utf-8")) for path in (source, target))
    merged = _with_auto_map(old, new)
    if merged != old:
        text = json.dumps(merged, indent=2, sort_keys=True, ensure_ascii=False)
        target.write_text(text + "\n", encoding="utf-8")


def _with_auto_map(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = {
        key: _with_auto_map(value, new[key]) if isinstance(value, dict) and isinstance(new.get(key), dict) else value
        for key, value in old.items()
        if key != "auto_map"
    }
    return {**merged, "auto_map": new["auto_map"]} if "auto_map" in new else merged


def main(model: Annotated[Path, typer.Argument(help="Folder of the model.")] = MODEL) -> None:
    """Update the code in the shipped model to that of the package."""
    refresh_code(model)


if __name__ == "__main__":
    typer.run(main)
