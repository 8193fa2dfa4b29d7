"""The registry of model families, and a new family of new files and one line."""

import shutil
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

import mgllava
from mgllava.families import FAMILIES, family_of, resolve
from tests import processes
from tests.golden_cases import GOLDEN
from tests.tiny import tiny_model, tiny_slime

PACKAGE = Path(mgllava.__file__).parent
TOY = Path(__file__).parent / "toy_family"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_import_strings_of_a_family_name_its_classes(model_type):
    family = FAMILIES[model_type]
    config, model = resolve(family.config), resolve(family.model)
    assert config.model_type == model_type and model.config_class is config
    assert family_of(config(), has_text=family.processor is not None) is family
    for name in (family.base_model, family.processor, family.card, family.build, family.chat_templates):
        assert name is None or resolve(name) is not None
    assert all(resolve(name).model_type == model_type for name in family.source_formats)
    assert set(family.image_processors) == {"torchvision", "pil"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_auto_classes_load_the_model_of_a_family(model_type):
    family = FAMILIES[model_type]
    config = resolve(family.config)
    assert "AutoModel" in family.auto_classes
    for name in family.auto_classes:
        assert getattr(transformers, name)._model_mapping[config] is resolve(family.model)
    for backend, name in family.image_processors.items():
        assert IMAGE_PROCESSOR_MAPPING[config][backend] is resolve(name)
    # Their code is copied into saved models.
    classes = [config, *(resolve(name) for name in (family.model, *family.image_processors.values()))]
    optional = (family.processor, family.video_processor, family.base_model)
    assert all(one._auto_class for one in [*classes, *(resolve(name) for name in optional if name)])


@pytest.mark.parametrize(
    ("model_type", "build"),
    [("mgllava", lambda: tiny_model(object_merging="box_to_fused")), ("slime", tiny_slime)],
)
def test_training_of_a_family_is_that_of_the_original(model_type, build):
    """LoRA trains the language model, the towers are frozen, all else is trained; 2,048 tokens less an image's 576."""
    family = FAMILIES[model_type]
    names = {name for name, _ in build().model.named_children()}
    assert set(family.trained_whole) == {n for n in names if n != "language_model" and not n.endswith("_tower")}
    assert family.max_text_length == 2048 - 576
    assert set(family.parts) == {"llm"} | {
        n.replace("_vision", "") if "high" in n else n for n in names if "tower" in n
    }


def test_other_families_are_refused():
    from transformers import LlamaConfig

    from mgllava import RamPlusConfig

    with pytest.raises(ValueError, match=r"must be MG-LLaVA \('mgllava'\) or SliME \('slime'\), got 'llama'"):
        family_of(LlamaConfig())
    with pytest.raises(ValueError, match="got 'ram_plus'"):
        family_of(RamPlusConfig())


def test_new_family_needs_its_files_and_one_line_only(tmp_path):
    """The toy family converts, exports, loads by remote code, chats, serves and trains for one step."""
    package = tmp_path / "src" / "mgllava"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in TOY.glob("*/*.py"):
        target = package / file.relative_to(TOY)
        assert not target.exists()
        shutil.copyfile(file, target)
    registry = package / "families" / "__init__.py"
    line, toy = '    "mgllava": MGLLAVA,\n', '    "toy": __import__("mgllava.families.toy", fromlist=["TOY"]).TOY,\n'
    text = registry.read_text()
    assert text.count(line) == 1
    registry.write_text(text.replace(line, line + toy))

    work = tmp_path / "work"
    work.mkdir()
    places = {"PYTHONPATH": package.parent, "HF_MODULES_CACHE": tmp_path / "modules"}
    done = processes.capture(TOY / "session.py", work, GOLDEN / "llm", **places)
    assert done.returncode == 0, done.stderr[-4000:]
    remote = processes.capture(TOY / "remote.py", work / "exported", work / "image.png", **places)
    assert remote.returncode == 0, remote.stderr[-4000:]
    assert remote.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
