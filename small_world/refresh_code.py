"""Update the code in the shipped models to that of the package.

    python -m small_world.refresh_code

Like every saved model, the shipped ones contain their code, so that they load where `mgllava` is not installed. Run
this after each change of `src/mgllava/modeling` or `src/mgllava/processing`; a test compares them.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoConfig
from transformers.dynamic_module_utils import custom_object_save

from mgllava.families import FAMILIES, resolve

_HERE = Path(__file__).parent
# The shipped models.
MODELS = (_HERE / "model", _HERE / "slime_model", _HERE / "video_model")
_TAGGER = Path("box_detector") / "tagger"


def refresh_code(model: Path) -> None:
    """Replace the code and the `auto_map` entries of a model and its tagger (if it has one), and nothing else."""
    for folder in (model, model / _TAGGER):
        if not folder.exists():
            continue
        config = AutoConfig.from_pretrained(folder)
        family = FAMILIES[config.model_type]
        processor = family.processor or family.image_processors["torchvision"]
        with tempfile.TemporaryDirectory() as name:
            saved = Path(name)
            config.save_pretrained(saved)
            custom_object_save(resolve(family.model), saved)
            resolve(processor).from_pretrained(folder).save_pretrained(saved)
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


def main(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Folders of models; by default the shipped ones.")
    ] = None,
) -> None:
    """Update the code in the shipped models to that of the package."""
    for model in models or MODELS:
        refresh_code(model)


if __name__ == "__main__":
    typer.run(main)
