"""Private names of other packages that this one uses: if one is removed, a test fails here."""

import inspect
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import pytest
from safetensors.torch import load_file
from transformers import GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PushToHubMixin

from mgllava import BoxDetector, MGLlavaForConditionalGeneration
from mgllava.processing import CHAT_TEMPLATES, image_text_processor_common
from tests.processing.detectors import OWLV2
from tests.processing.test_processing import small
from tests.tiny import tiny_inputs, tiny_model


@pytest.fixture
def uploads(monkeypatch):
    """Replace the Hub by a fake; return the paths of the uploaded files by revision."""
    sent = {}

    def create_commit(self, repo_id, operations, *, revision=None, create_pr=None, **options):
        revision = "refs/pr/1" if create_pr else revision
        sent.setdefault(revision, []).extend(operation.path_in_repo for operation in operations)
        return SimpleNamespace(pr_revision=revision, oid="c0ffee")

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, revision=None, **options):
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        sent.setdefault(revision, []).extend(f"{path_in_repo}/{name}" for name in names)

    card = SimpleNamespace(save=lambda path: None)
    for name, fake in {
        "create_commit": create_commit,
        "upload_folder": upload_folder,
        "create_repo": lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id),
        "create_branch": lambda self, **options: None,
    }.items():
        monkeypatch.setattr(huggingface_hub.HfApi, name, fake)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: card)
    return sent


@pytest.mark.parametrize("options", [{}, {"revision": "v1"}, {"create_pr": True}], ids=str)
def test_pushing_calls_upload_modified_files(options, uploads):
    processor = small()
    processor.box_detector = BoxDetector(["cat"], OWLV2)
    processor.push_to_hub("org/name", **options)
    (names,) = uploads.values()
    assert {"processor_config.json", "box_detector/detector/model.safetensors"} <= set(names)
    assert len(set(names)) == len(names)
    assert list(uploads) == [options.get("revision") or ("refs/pr/1" if options else None)]


def test_saving_calls_upload_modified_files(uploads, tmp_path):
    processor = small()
    processor.box_detector = BoxDetector(["cat"], OWLV2)
    processor.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="org/name")
    assert "box_detector/detector/model.safetensors" in uploads[None]


def test_without_upload_modified_files_pushing_is_refused(uploads, tmp_path, monkeypatch):
    monkeypatch.delattr(PushToHubMixin, "_upload_modified_files")
    assert not hasattr(ProcessorMixin, "_upload_modified_files")
    processor = small()
    for push in (
        lambda: processor.push_to_hub("org/name"),
        lambda: processor.save_pretrained(str(tmp_path / "new"), push_to_hub=True, repo_id="org/name"),
    ):
        with pytest.raises(RuntimeError, match="_upload_modified_files"):
            push()
    assert not uploads and not (tmp_path / "new").exists()


def test_image_in_user_text_is_not_a_placeholder():
    """With `sanitize_control_tokens`, `_UNMARKED` tells the `<image>` of a user from a placeholder."""
    if "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters:
        pytest.skip("this release of transformers cannot sanitize")
    processor = small()
    messages = [{"role": "user", "content": "<image>"}]
    options = {"tokenize": True, "sanitize_control_tokens": True, "chat_template": CHAT_TEMPLATES["vicuna"]}
    (ids,) = processor.apply_chat_template(messages, **options)
    assert processor.image_token_id not in ids and "<image>" in processor.decode(ids)


def test_sanitizing_without_unmarked_is_refused(monkeypatch):
    monkeypatch.setattr(image_text_processor_common, "_UNMARKED", None)
    options = {"tokenize": True, "sanitize_control_tokens": True, "chat_template": CHAT_TEMPLATES["vicuna"]}
    with pytest.raises(NotImplementedError, match="`sanitize_control_tokens`"):
        small().apply_chat_template([{"role": "user", "content": "<image>"}], **options)
    with pytest.raises(NotImplementedError, match="`sanitize_control_tokens`"):
        small()(text="a", sanitize_control_tokens=True)


@pytest.mark.parametrize("name", ["_expand_inputs_for_generation", "_supports_default_dynamic_cache"])
def test_generation_without_a_hook_is_refused(name, monkeypatch):
    assert callable(getattr(GenerationMixin, name))
    model, inputs = tiny_model(), tiny_inputs([[1]])
    monkeypatch.delattr(GenerationMixin, name)
    with pytest.raises(RuntimeError, match=name):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("name", ["_tied_weights_keys", "initialize_weights", "_is_stateful", "loss_function"])
def test_names_that_the_model_overrides_exist_in_transformers(name):
    assert hasattr(PreTrainedModel, name)


def test_weight_conversions_are_what_saving_reverts(tmp_path, monkeypatch):
    """Under ZeRO-3, transformers keeps conversions that changed no name."""
    tiny_model().save_pretrained(tmp_path / "saved")
    load = PreTrainedModel.from_pretrained.__func__

    def load_as_under_zero3(cls, *args, **options):
        model = load(cls, *args, **options)
        assert isinstance(model._weight_conversions, list)
        model._weight_conversions = get_model_conversion_mapping(model)
        return model

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load_as_under_zero3))
    for name, load_model in (
        ("loaded by us", MGLlavaForConditionalGeneration.from_pretrained),
        ("loaded as under ZeRO-3", partial(load_as_under_zero3, MGLlavaForConditionalGeneration)),
    ):
        load_model(tmp_path / "saved").save_pretrained(tmp_path / name)
    expected, found, broken = (
        load_file(tmp_path / name / "model.safetensors").keys()
        for name in ("saved", "loaded by us", "loaded as under ZeRO-3")
    )
    assert found == expected != broken


def test_the_parts_of_a_processor_are_loaded_by_a_method_that_is_overridden():
    """Without it, model folders that were saved before videos would not load."""
    assert hasattr(ProcessorMixin, "_get_arguments_from_pretrained")
    names = list(inspect.signature(ProcessorMixin._get_arguments_from_pretrained).parameters)
    assert names[:2] == ["pretrained_model_name_or_path", "processor_dict"]
