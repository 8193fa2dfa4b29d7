"""Hub folders can be copied, imports go in one direction, and the public names do not change."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import mgllava
from mgllava.families import FAMILIES

PACKAGE = Path(mgllava.__file__).parent
HUB_FOLDERS = ("modeling", "processing")
HUB_FILES = sorted(path for folder in HUB_FOLDERS for path in (PACKAGE / folder).glob("*.py"))
# A file belongs to one family, or to all.
SUFFIXES = (*(f"_{family}.py" for family in FAMILIES), "_common.py")
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

# From the lowest floor to the highest: imports only go downward. "mgllava" is the `__init__` of the package.
FLOORS = (
    ("modeling", "processing"),
    ("errors", "families", "quantization"),
    ("mgllava",),
    ("extras", "noise", "model_files", "atomic_files", "folder_lock", "user_text"),
    ("conversion", "hub", "training", "chat", "box_files", "visualization"),
    ("serving", "evaluation"),
    ("integrations",),
    ("commands",),
    ("cli",),
    ("__main__",),
)


SAVED_CLASSES = {"MGLlavaConfig", "RamPlusConfig", "SlimeConfig", "MGLlavaProcessor", "SlimeProcessor", "BoxDetector"}


def imports(path):
    """Yield level, module and name of every imported name, also inside functions; no name for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name, "") for alias in node.names)


def siblings(path):
    """Return the sibling modules that a file of a Hub folder imports."""
    return {module for level, module, _ in imports(path) if level == 1}


def place_of(path):
    """Return the package of a file, or the name of a module outside packages."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "mgllava" if parts == ("__init__",) else parts[0]


def imported_places(path):
    """Yield the places that a file imports from."""
    for level, module, name in imports(path):
        base = ("mgllava", *path.relative_to(PACKAGE).parts[:-level]) if level else ()
        package, *rest = ".".join(filter(None, [*base, module, name])).split(".")
        if package == "mgllava":
            yield rest[0] if rest and exists(rest[0]) else "mgllava"


def exists(place):
    return (PACKAGE / place).is_dir() or (PACKAGE / f"{place}.py").is_file()


def test_no_import_goes_from_a_lower_to_a_higher_floor():
    height = {place: floor for floor, places in enumerate(FLOORS) for place in places}
    files = sorted(PACKAGE.rglob("*.py"))
    assert {place_of(path) for path in files} <= set(height), "every package and module has a floor"
    upward = {
        f"{path.relative_to(PACKAGE)} imports {place}"
        for path in files
        for place in imported_places(path)
        if height[place] > height[place_of(path)]
    }
    assert upward == set()


def test_packages_import_each_other_in_one_direction():
    needs = {}
    for path in PACKAGE.rglob("*.py"):
        needs.setdefault(place_of(path), set()).update(set(imported_places(path)) - {place_of(path)})
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle of imports: {' <- '.join(error.args[1])}") from error


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_hub_file_imports_siblings_and_core_packages_only(path):
    for level, module, _ in imports(path):
        if level == 0:
            package = module.split(".")[0]
            assert package in HUB_PACKAGES | set(sys.stdlib_module_names), module
        else:
            assert level == 1, f"leaves the folder: {module}"
            assert (path.parent / f"{module}.py").is_file(), f"no sibling file {module}"


def test_hub_file_names_are_unique_and_have_our_endings():
    names = [path.name for path in HUB_FILES if path.name != "__init__.py"]
    assert len(names) == len(set(names))
    assert all(name.endswith(SUFFIXES) for name in names)


def test_common_files_do_not_depend_on_a_family():
    """They are copied into the saved models of every family, together with the files that they import."""
    common = [path for path in HUB_FILES if path.name.endswith("_common.py")]
    found = {f"{path.name}: {module}" for path in common for module in siblings(path)}
    assert common and all(entry.endswith("_common") for entry in found), found


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_transformers_finds_the_files_that_a_hub_file_needs(path):
    """It searches by a regular expression, also in docstrings, and copies what it finds into saved models."""
    needed, pending = set(), [path]
    while pending:
        current = pending.pop()
        new = {current.parent / f"{module}.py" for module in siblings(current)} - needed
        needed |= new
        pending += new
    assert {Path(found) for found in get_relative_import_files(path)} == needed


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_hub_files_do_not_compare_classes_of_their_own(path):
    """From a local folder, configuration and model load different modules, each with a class of that name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            names = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            assert not names & SAVED_CLASSES, names


def test_no_hub_file_imports_files_of_another_family():
    """They would be copied into its saved models."""
    for path in HUB_FILES:
        own = [suffix for suffix in SUFFIXES if path.name.endswith(suffix)]
        for module in siblings(path) if own else ():
            assert f"{module}.py".endswith((own[0], "_common.py")), f"{path.name} imports {module}"


def test_saved_classes_save_their_code():
    """Without `_auto_class`, saving a loaded model again keeps `auto_map`, but not the files that it names."""
    saved = [
        value
        for name in mgllava.__all__
        if hasattr(value := getattr(mgllava, name), "save_pretrained") and name != "BoxDetector"
    ]
    unregistered = [value.__name__ for value in saved if value._auto_class is None]
    assert len(saved) == 19 and unregistered == ["MGLlavaPreTrainedModel", "SlimePreTrainedModel"]


def test_public_names():
    assert sorted(mgllava.__all__) == [
        "BoxDetector",
        "COCO_80",
        "MGLlavaConfig",
        "MGLlavaError",
        "MGLlavaForConditionalGeneration",
        "MGLlavaImageProcessor",
        "MGLlavaImageProcessorPil",
        "MGLlavaModel",
        "MGLlavaPreTrainedModel",
        "MGLlavaProcessor",
        "MGLlavaVideoProcessor",
        "RamPlusConfig",
        "RamPlusForImageTagging",
        "RamPlusImageProcessor",
        "RamPlusImageProcessorPil",
        "SlimeConfig",
        "SlimeForConditionalGeneration",
        "SlimeImageProcessor",
        "SlimeImageProcessorPil",
        "SlimeModel",
        "SlimePreTrainedModel",
        "SlimeProcessor",
        "add_videos",
        "build_from_parts",
        "quantization_config",
    ]
    assert all(hasattr(mgllava, name) for name in mgllava.__all__)
