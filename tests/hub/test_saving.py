"""Code and `auto_map` that `save_pretrained` and `push_to_hub` write."""

import ast
import json
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import mgllava
from mgllava import (
    BoxDetector,
    MGLlavaForConditionalGeneration,
    MGLlavaImageProcessor,
    MGLlavaImageProcessorPil,
    RamPlusForImageTagging,
    RamPlusImageProcessor,
    RamPlusImageProcessorPil,
)
from tests.processing.detectors import OWLV2
from tests.tiny import tiny_config, tiny_model

PACKAGE = Path(mgllava.__file__).parent
HUB_FOLDERS = ("modeling", "processing")
BACKENDS = {
    "torchvision": "image_processing_mgllava.MGLlavaImageProcessor",
    "pil": "image_processing_mgllava.MGLlavaImageProcessorPil",
}
MODEL = "modeling_mgllava.MGLlavaForConditionalGeneration"


def assert_code_is_the_package(folder):
    files = list(folder.glob("*.py"))
    assert files
    for path in files:
        (of_package,) = (PACKAGE / part / path.name for part in HUB_FOLDERS if (PACKAGE / part / path.name).is_file())
        assert path.read_bytes() == of_package.read_bytes(), path.name
        for needed in get_relative_import_files(path):
            assert Path(needed).is_file()


def assert_auto_map_names_classes(folder, auto_map):
    for entry in auto_map.values():
        for reference in entry.values() if isinstance(entry, dict) else [entry]:
            module, name = reference.split(".")
            tree = ast.parse((folder / f"{module}.py").read_text())
            assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)], reference


@pytest.mark.parametrize(
    ("make", "file", "expected"),
    [
        (
            tiny_model,
            "config.json",
            {
                "AutoConfig": "configuration_mgllava.MGLlavaConfig",
                "AutoModel": MODEL,
                "AutoModelForImageTextToText": MODEL,
                "AutoModelForMultimodalLM": MODEL,
            },
        ),
        (
            lambda: tiny_model().model,
            "config.json",
            {
                "AutoConfig": "configuration_mgllava.MGLlavaConfig",
                "AutoModel": "modeling_mgllava.MGLlavaModel",
                "AutoModelForImageTextToText": MODEL,
                "AutoModelForMultimodalLM": MODEL,
            },
        ),
        (MGLlavaImageProcessor, "preprocessor_config.json", {"AutoImageProcessor": BACKENDS}),
        (MGLlavaImageProcessorPil, "preprocessor_config.json", {"AutoImageProcessor": BACKENDS}),
        *(
            (
                image_processor,
                "preprocessor_config.json",
                {
                    "AutoImageProcessor": {
                        "torchvision": "image_processing_ram_plus.RamPlusImageProcessor",
                        "pil": "image_processing_ram_plus.RamPlusImageProcessorPil",
                    }
                },
            )
            for image_processor in (RamPlusImageProcessor, RamPlusImageProcessorPil)
        ),
    ],
)
def test_saving_writes_the_code_and_names_its_classes(make, file, expected, tmp_path):
    saved = make()
    for folder in (tmp_path / "first", tmp_path / "again"):  # saving once must not affect the next time
        saved.save_pretrained(folder)
        auto_map = json.loads((folder / file).read_text())["auto_map"]
        assert auto_map == expected
        assert_code_is_the_package(folder)
        assert_auto_map_names_classes(folder, auto_map)


def test_conversions_write_the_code_too(repository, tagger_repository):
    paths = [path for part in HUB_FOLDERS for path in (PACKAGE / part).glob("*.py")]
    ours = {path.name: path.read_bytes() for path in paths}
    for folder in (repository, tagger_repository):
        config = json.loads((folder / "config.json").read_text())
        assert_auto_map_names_classes(folder, config["auto_map"])
        code = {path.name: path.read_bytes() for path in folder.glob("*.py")}
        assert code and all(ours[name] == content for name, content in code.items())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    processor = json.loads((repository / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_mgllava.MGLlavaProcessor"}
    assert processor["image_processor"]["auto_map"] == {"AutoImageProcessor": BACKENDS}


def test_detector_in_memory_is_saved_with_the_code_of_its_tagger(tagger_repository, tmp_path):
    tagger = RamPlusForImageTagging.from_pretrained(tagger_repository)
    detector = BoxDetector(tagger, OWLV2, tagger_processor=RamPlusImageProcessor.from_pretrained(tagger_repository))
    detector.save_pretrained(tmp_path)
    assert_code_is_the_package(tmp_path / "box_detector" / "tagger")


def test_other_entries_of_auto_map_are_kept(tmp_path):
    config = tiny_config()
    config.auto_map = {"AutoModel": "somebody/fork--modeling_fork.Fork", "AutoModelForCausalLM": "other.Other"}
    config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "somebody/fork--modeling_fork.Fork"
    assert auto_map["AutoModelForCausalLM"] == "other.Other"
    assert auto_map["AutoModelForImageTextToText"] == MODEL

    class Own(MGLlavaImageProcessor):
        pass

    Own.save_pretrained(own := Own(), tmp_path)
    module = __name__.rsplit(".", maxsplit=1)[-1]
    assert own.to_dict()["auto_map"]["AutoImageProcessor"] == f"{module}.Own"


def test_push_to_hub_uploads_the_code(monkeypatch, tmp_path):
    uploads = []

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        uploads.append({path.name for path in Path(working_dir).iterdir()})

    for owner in (MGLlavaForConditionalGeneration, MGLlavaImageProcessor):
        monkeypatch.setattr(owner, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.create_repo", lambda *args, **kwargs: FakeUrl(), raising=False)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: FakeCard())
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: FakeUrl())
    monkeypatch.chdir(tmp_path)
    for saved, files in (
        (tiny_model(), {"modeling_mgllava.py", "configuration_mgllava.py", "vision_mgllava.py"}),
        (MGLlavaImageProcessor(), {"image_processing_mgllava.py", "images_common.py", "boxes_mgllava.py"}),
    ):
        saved.push_to_hub("org/name")
        assert files <= uploads[-1]


class FakeUrl(str):
    repo_id = "org/name"


class FakeCard:
    def save(self, path):
        pass


def test_adapter_is_saved_without_the_model(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(tiny_model(), lora).save_pretrained(tmp_path / "peft")
    assert {path.name for path in (tmp_path / "peft").iterdir()} >= {"adapter_config.json"}
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:  # this release of transformers needs a newer peft
        pytest.skip(str(error))
    model = tiny_model()
    model.add_adapter(lora)
    model.save_pretrained(tmp_path / "transformers")
    names = {path.name for path in (tmp_path / "transformers").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
