"""Packages that `import mgllava` loads."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The baseline: modules that every user of a vision-language model of transformers loads.
LLAVA = """
import torch, transformers
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel
from transformers import LlamaModel, LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
"""
PRINT_MODULES = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))\n"
USE_NAMES = """
from operator import attrgetter
for name in {names!r}:
    attrgetter(name.removeprefix("mgllava."))(mgllava)
assert len(mgllava.COCO_80) == 80 and "chat" in dir(mgllava)
try:
    mgllava.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError
"""
# transformers imports deepspeed itself where it is installed, so only the modules of this package are judged.
WITHOUT_DEEPSPEED = """
sys.modules["deepspeed"] = None
import mgllava.cli, mgllava.conversion
from mgllava.conversion.xtuner.zero import open_zero_folder
"""


def test_importing_loads_little_beyond_transformers_and_finds_the_documented_names():
    """It runs in a new process, since other tests have imported modules in this one.

    benchmarks/import_time.py measures the time, which depends on the machine. Deprecation warnings are errors here.
    """
    names = set()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        names |= set(re.findall(r"\bmgllava\.[a-z_]+(?:\.\w+)*", path.read_text()))
    not_attributes = (".atomic_files", ".integrations")  # the latter are started with `python -m`
    names -= {
        name for name in names if name.endswith((".cli", ".git")) or any(part in name for part in not_attributes)
    }
    assert {"mgllava.chat.ChatSession", "mgllava.visualization.draw_boxes"} <= names
    use_names = USE_NAMES.format(names=sorted(names))
    code = LLAVA + PRINT_MODULES + "import mgllava" + PRINT_MODULES + use_names + WITHOUT_DEEPSPEED
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, loaded = (set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("["))
    packages = {name.split(".")[0] for name in loaded - before} - set(sys.stdlib_module_names)
    # timm is the only new package. It and the detectors load more modules of the others.
    known = {"mgllava", "timm", "torch", "torchvision", "transformers", "PIL"}
    assert {name for name in packages if not name.startswith("_")} <= known
    assert loaded.isdisjoint(
        {"bitsandbytes", "open_clip", "deepspeed", "gradio", "peft", "datasets", "fastapi", "uvicorn", "openai"}
    )
    assert not {name for name in loaded if name.startswith(("mgllava.conversion", "mgllava.box_files", "mgllava.cli"))}


def test_names_are_listed_and_imported_on_first_use():
    """In this process, in which most of them have been imported; the tests above have new ones."""
    import pytest

    import mgllava

    modules = (
        "box_files",
        "chat",
        "conversion",
        "evaluation",
        "folder_lock",
        "hub",
        "serving",
        "training",
        "visualization",
    )
    for name in modules:
        assert name in dir(mgllava) and mgllava.__getattr__(name).__name__ == f"mgllava.{name}"
    for name in ("add_videos", "build_from_parts"):
        assert name in dir(mgllava) and mgllava.__getattr__(name) is getattr(mgllava.conversion, name)
    assert set(mgllava.__all__) <= set(dir(mgllava)) and all(hasattr(mgllava, name) for name in mgllava.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        mgllava.no_such_name  # noqa: B018
