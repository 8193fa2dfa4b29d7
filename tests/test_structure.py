"""What keeps the Hub folders copyable, the dependencies one-way, and the public names stable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mgllava

PACKAGE = Path(mgllava.__file__).parent
HUB_FOLDERS = ("modeling", "processing", "ram_plus")
HUB_FILES = sorted(path for folder in HUB_FOLDERS for path in (PACKAGE / folder).glob("*.py"))
HUB_PACKAGES = {
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "huggingface_hub",
    "numpy",
    "PIL",
    "tokenizers",
    "safetensors",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_hub_file_imports_siblings_and_core_packages_only(path):
    for level, module in imports(path):
        if level == 0:
            package = module.split(".")[0]
            assert package in HUB_PACKAGES | set(sys.stdlib_module_names), module
        else:
            assert level == 1, f"leaves the folder: {module}"
            assert (path.parent / f"{module}.py").is_file(), f"no sibling file {module}"


def test_hub_file_names_are_unique_and_ours():
    names = [path.name for path in HUB_FILES if path.name != "__init__.py"]
    assert len(names) == len(set(names))
    assert all(name.endswith(("_mgllava.py", "_ram_plus.py")) for name in names)


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_text_of_a_hub_file_reads_like_an_import(path):
    """transformers finds relative imports by a regular expression, docstrings included."""
    matches = re.findall(r"^\s*(?:from|import)\s+\.(\w+)", path.read_text(), flags=re.MULTILINE)
    assert set(matches) == {module for level, module in imports(path) if level == 1}


def test_importing_the_package_is_light():
    code = "import sys, mgllava; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert loaded.isdisjoint({"bitsandbytes", "open_clip", "deepspeed", "peft", "datasets", "gradio"})
    assert "mgllava.conversion" not in loaded


def test_public_names():
    assert sorted(mgllava.__all__) == [
        "BoxDetector",
        "MGLlavaConfig",
        "MGLlavaForConditionalGeneration",
        "MGLlavaImageProcessor",
        "MGLlavaImageProcessorPil",
        "MGLlavaModel",
        "MGLlavaPreTrainedModel",
        "MGLlavaProcessor",
        "RamPlusConfig",
        "RamPlusForImageTagging",
        "RamPlusImageProcessor",
        "RamPlusImageProcessorPil",
    ]
    assert all(hasattr(mgllava, name) for name in mgllava.__all__)
