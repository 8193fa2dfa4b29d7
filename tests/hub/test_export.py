"""`mgllava export` writes a complete model folder, or none."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mgllava
from mgllava import MGLlavaForConditionalGeneration, MGLlavaProcessor
from mgllava.cli import app
from mgllava.conversion import ConversionError
from mgllava.families import FAMILIES
from mgllava.hub import export, export_repository, loading_check, upload, verify
from mgllava.hub.card_sections import Contents
from mgllava.hub.model_card import model_card
from mgllava.model_files import sources
from tests import processes
from tests.hub.repositories import save_family
from tests.processing.detectors import OWLV2

TAG = f"v{mgllava.__version__}"


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that a user saved, in several weight shards."""
    return save_family(tmp_path_factory.mktemp("saved") / "model", "vicuna", max_shard_size="200KB")


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(params=["forked", pytest.param("started", marks=pytest.mark.slow)])
def verified(request, monkeypatch):
    """Verify exports in a forked process, or in a new interpreter as the command does."""

    def run(command, env, **_):
        assert command[0] == sys.executable
        return processes.capture(*command[1:], env=env)

    if request.param == "forked":
        monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))


def test_an_export_is_complete_and_changes_no_weights(saved, tmp_path, verified):
    output = tmp_path / "out"
    result = run(saved, "--output", output)
    assert result.exit_code == 0 and f"Wrote {output}" in result.output, result.output
    names = {path.name for path in output.iterdir()}
    assert names >= {path.name for path in saved.iterdir()} | {"README.md"}
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name in set(index.values()):
        assert (output / name).read_bytes() == (saved / name).read_bytes()
        assert (output / name).stat().st_ino != (saved / name).stat().st_ino
        with safe_open(output / name, "pt") as file:
            assert set(file.keys()) == {key for key, shard in index.items() if shard == name}
    assert (output / "generation_config.json").read_text() == (saved / "generation_config.json").read_text()
    _, info = MGLlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert list(tmp_path.iterdir()) == [output]

    result = run(saved, "--output", output)
    assert result.exit_code == 1 and "exists. Choose another --output, or pass --overwrite" in result.output
    # Onto itself, which updates card and code, and removes modules of earlier versions.
    for name in ("modeling_mgllava.py", "attention_mgllava.py", "old_text_common.py", "tags_ram_plus.py"):
        (output / name).write_text("old")
    assert run(output, "--output", output, "--overwrite", "--no-verify").exit_code == 0
    assert {path.name for path in output.iterdir()} == names
    assert "class MGLlavaModel" in (output / "modeling_mgllava.py").read_text()


@pytest.mark.parametrize("change", ["missing", "shape", "index", "pickle", "config", "processor"])
def test_broken_model_folders_are_refused_before_anything_is_written(change, copied, tmp_path):
    index_path = copied / "model.safetensors.index.json"
    shard = copied / json.loads(index_path.read_text())["weight_map"]["model.box_projector.linear_1.weight"]
    name = "model.box_projector.linear_1.weight"
    if change in ("missing", "shape"):
        weights = load_file(shard)
        value = weights.pop(name)
        if change == "shape":
            weights[name] = value[:-1]
        else:
            index = json.loads(index_path.read_text())
            del index["weight_map"][name]
            index_path.write_text(json.dumps(index))
        save_file(weights, shard, metadata={"format": "pt"})
    elif change == "index":
        shard.unlink()
    elif change == "pickle":
        index_path.unlink()
        torch.save({"x": torch.zeros(1)}, copied / "pytorch_model.bin")
    elif change == "config":
        (copied / "config.json").write_text('{"model_type": "llava"}')
    else:
        (copied / "processor_config.json").unlink()
    message = {
        "missing": f"missing: 1\n  {name}",
        "shape": f"wrong shape: 1\n  {name}: expected",
        "index": "names shards that do not exist",
        "pickle": "must hold safetensors, got pytorch_model.bin",
        "config": "must be a model of MG-LLaVA, RAM\\+\\+ or SliME, got .* of type 'llava'",
        "processor": "must hold the model's processor",
    }[change]
    with pytest.raises(ConversionError, match=message):
        export_repository(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.incomplete").exists()


def test_model_folder_that_does_not_load_is_not_published(saved, tmp_path, monkeypatch, verified):
    """Its code imports the package, which is installed here."""
    save_code = export.custom_object_save

    def save_other_code(model, folder):
        save_code(model, folder)
        with (folder / "vision_mgllava.py").open("a") as file:
            file.write("\nimport mgllava\n")

    monkeypatch.setattr(export, "custom_object_save", save_other_code)
    with pytest.raises(
        ConversionError, match=r"does not load where mgllava is not installed(.|\n)*import of mgllava halted"
    ):
        export_repository(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_detector_in_folders_or_by_id(families, tagger_repository, tmp_path, monkeypatch):
    model = families["vicuna"]
    fetched = []

    def fetch(name, argument, patterns, revision=None):
        fetched.append((str(name), revision))
        return {"org/tagger": tagger_repository, "org/detector": OWLV2}.get(str(name), model)

    for module in (export, sources):
        monkeypatch.setattr(module, "fetch", fetch)
    options = {"tagger": "org/tagger", "detector": "org/detector", "verify": False}
    export_repository("org/model", tmp_path / "ids", revision="r1", **options)
    assert fetched == [("org/model", "r1")]
    config = json.loads((tmp_path / "ids" / "processor_config.json").read_text())["box_detector_config"]
    assert config == {"tagger": "org/tagger", "detector": "org/detector", "mode": "faithful"}
    assert not (tmp_path / "ids" / "box_detector").exists()

    (stale := tagger_repository / "modeling_ram_plus.py").write_bytes(stale.read_bytes() + b"# older\n")
    try:
        export_repository("org/model", tmp_path / "folders", with_detector=True, **options)
    finally:
        stale.write_bytes(stale.read_bytes().removesuffix(b"# older\n"))
    config = json.loads((tmp_path / "folders" / "processor_config.json").read_text())["box_detector_config"]
    assert config["tagger"] == "./box_detector/tagger" and config["detector"] == "./box_detector/detector"
    code = tmp_path / "folders" / "box_detector" / "tagger" / "modeling_ram_plus.py"
    assert code.read_bytes() == stale.read_bytes()
    detector = MGLlavaProcessor.from_pretrained(tmp_path / "folders").load_box_detector(device="cpu")
    assert detector.mode == "faithful"

    with pytest.raises(ConversionError, match="`tagger` must be given, since the processor has none"):
        export_repository(model, tmp_path / "none", with_detector=True)


def test_parts_that_stay_on_the_hub_are_pinned(families, tmp_path, monkeypatch):
    commits = {("org/tagger", None): "a" * 40, ("org/detector", None): "b" * 40}

    class Api:
        def model_info(self, name, revision=None):
            if (name, revision) not in commits:
                response = SimpleNamespace(headers={}, request=None, status_code=404)
                raise RepositoryNotFoundError("404", response=response)
            return SimpleNamespace(sha=commits[name, revision])

    monkeypatch.setattr(export, "HfApi", Api)
    options = {"tagger": "org/tagger", "detector": "org/detector", "verify": False}
    export_repository(families["vicuna"], tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "processor_config.json").read_text())["box_detector_config"]
    assert config == {
        "tagger": "org/tagger",
        "tagger_revision": "a" * 40,
        "detector": "org/detector",
        "detector_revision": "b" * 40,
        "mode": "faithful",
    }
    assert f"at `{'a' * 40}`" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConversionError, match="`tagger` must be a folder or a repository on the Hub"):
        export_repository(families["vicuna"], tmp_path / "none", **{**options, "tagger": "org/typo"})


def test_link_in_a_part_of_the_box_detector_is_refused(families, tagger_repository, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret.txt").write_text("mine")
    tagger = shutil.copytree(tagger_repository, tmp_path / "tagger")
    (tagger / "notes.txt").symlink_to(tmp_path / "home" / "secret.txt")
    with pytest.raises(ConversionError, match=r"The processor cannot be saved: .*notes\.txt.* leads out of"):
        export_repository(families["vicuna"], tmp_path / "out", tagger=str(tagger), verify=False)
    assert not (tmp_path / "out").exists()


def test_ram_plus_is_exported_too(tagger_repository, tmp_path):
    output = export_repository(tagger_repository, tmp_path / "ram-plus", verify=False)
    assert {"README.md", "preprocessor_config.json", "modeling_ram_plus.py"} <= {p.name for p in output.iterdir()}
    assert ModelCard.load(output / "README.md").data.pipeline_tag == "image-classification"
    with pytest.raises(
        ConversionError, match="are for models whose processor finds boxes, which RamPlusImageProcessor does not"
    ):
        export_repository(tagger_repository, tmp_path / "other", with_detector=True)


def test_report_has_no_paths_of_this_machine(repository, tmp_path):
    output = export_repository(repository, tmp_path / "out", verify=False)
    for name in ("conversion_report.json", "README.md"):
        text = (output / name).read_text()
        assert str(repository.parent) not in text and "tests/golden" not in text
    report = json.loads((output / "conversion_report.json").read_text())
    assert report["arguments"]["llm"] == "llm"
    assert [file["file"] for file in report["sources"]["checkpoint"]] == ["iter_10.pth"]


def test_paths_in_a_report_are_cut_and_hub_ids_are_not(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    arguments = {"llm": "owner/name", "vision_tower": "owner/here", "checkpoint": "/home/me/iter_1.pth", "dtype": None}
    arguments |= {"high_res_tower": "some/more/folders", "prompt_template": "vicuna", "max_positions": 7}
    report = {"arguments": arguments, "sources": {"llm": [{"file": "/home/me/config.json", "bytes": 3}]}, "notes": []}
    (copied / "conversion_report.json").write_text(json.dumps(report))
    output = export_repository(copied, tmp_path / "out", verify=False)
    found = json.loads((output / "conversion_report.json").read_text())
    cut = {"vision_tower": "here", "checkpoint": "iter_1.pth", "high_res_tower": "folders"}
    assert found == {
        "arguments": {**arguments, **cut},
        "sources": {"llm": [{"file": "config.json", "bytes": 3}]},
        "notes": [],
    }
    for damaged in ({"arguments": []}, {"sources": []}, {"sources": {"x": [3]}}, {"sources": {"x": [{}]}}):
        (copied / "conversion_report.json").write_text(json.dumps(damaged))
        with pytest.raises(ConversionError, match=r"conversion_report\.json is not the report of a conversion"):
            export_repository(copied, tmp_path / "other", verify=False)


def test_hand_written_card_is_kept_and_a_generated_one_is_not(copied, tmp_path):
    (copied / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    output = export_repository(copied, tmp_path / "own", verify=False)
    assert (output / "README.md").read_text().endswith("Mine.\n")
    (copied / "README.md").unlink()
    first = export_repository(copied, tmp_path / "first", verify=False)
    second = export_repository(first, tmp_path / "second", tag="v9", verify=False)
    assert '"revision": "v9"' in (second / "README.md").read_text()


VICUNA = {"llm": "lmsys/vicuna-7b-v1.5", "vision_tower": "openai/clip-vit-large-patch14-336"}


def published_contents(**changes):
    """Contents of the card of the authors' 7B model, without its weights."""
    config = mgllava.MGLlavaConfig(dtype="float16")
    with torch.device("meta"):
        model = MGLlavaForConditionalGeneration(config)
    report = {
        "arguments": {**VICUNA, "high_res_tower": "somebody/convnext", "checkpoint": "iter_10805.pth"},
        "checkpoint": {"kind": "sft"},
        "sources": {"checkpoint": [{"file": "iter_10805.pth", "sha256": "0123abc"}]},
        "versions": {"mgllava": "0.1.0"},
    }
    values = {
        "config": config,
        "shapes": {name: tuple(value.shape) for name, value in model.state_dict().items()},
        "report": report,
        "box_detector": {"tagger": "./box_detector/tagger", "detector": "google/owlv2-large-patch14-ensemble"},
        "repo_id": "org/mg-llava",
        "tag": TAG,
        "checked_with": "transformers 5.0",
    }
    return Contents(**{**values, **changes})


def test_checkpoint_on_the_hub_is_a_base_model():
    arguments = {**published_contents().report["arguments"], "checkpoint": "somebody/mg-llava"}
    card = model_card(published_contents(report={"arguments": arguments}))
    assert card.data.base_model[-1] == "somebody/mg-llava"


def test_card_of_a_family_without_its_own_lists_the_checks(monkeypatch):
    contents = published_contents()
    monkeypatch.setitem(FAMILIES, "mgllava", dataclasses.replace(FAMILIES["mgllava"], card=None))
    card = model_card(contents)
    assert card.data.library_name == "transformers" and "## What was checked" in card.text
    assert "arxiv" not in card.text


def test_card_tells_known_from_unknown_facts(tmp_path):
    contents = published_contents()
    card = model_card(contents)
    assert card.data.license == "llama2"
    assert card.data.base_model == [*VICUNA.values(), "somebody/convnext"]
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()
    text = card.text
    assert f'"org/mg-llava", {{"revision": "{TAG}"' in text
    assert (
        "| [somebody/convnext](https://huggingface.co/somebody/convnext) | unknown: see where it comes from |" in text
    )
    assert "| Llama 2 Community License |" in text and "| tagger | in this repository, `box_detector/tagger` |" in text
    assert "MMBench-dev | 72.1" in text and "(SHA-256 0123abc)" in text and "not measured again here" in text
    total = sum(torch.Size(shape).numel() for shape in contents.shapes.values())
    assert f"| **all** | {total:,} |" in text and 7.2e9 < total < 7.5e9
    memory = dict(re.findall(r"([\d.]+) GB in (bf16|8 bits|4 bits)", text))
    assert {unit: float(size) for size, unit in memory.items()} == {
        "bf16": pytest.approx(2 * total / 1e9, abs=0.01),
        # 32 layers of 4 squares of 4096 and 3 times 4096 x 11008.
        "8 bits": pytest.approx((2 * total - 32 * (4 * 4096**2 + 3 * 4096 * 11008)) / 1e9, abs=0.01),
        "4 bits": pytest.approx((2 * total - (2 - 0.5159) * 32 * (4 * 4096**2 + 3 * 4096 * 11008)) / 1e9, abs=0.01),
    }
    assert "`boxes`" not in text and '"boxes":' not in text  # the processor finds them
    assert "cannot be imported (transformers 5.0)" in text
    assert "cannot be imported" not in model_card(published_contents(checked_with=None)).text


@pytest.mark.parametrize(
    "changes",
    [
        {"report": {}},
        {"report": {"arguments": VICUNA, "checkpoint": {"kind": "lora"}}},
        {"report": {"arguments": {"llm": "somebody/llm"}, "checkpoint": {"kind": "sft"}}},
        {"config": mgllava.MGLlavaConfig(fusion_type="channel_concat")},
    ],
)
def test_results_of_the_paper_are_only_on_the_card_of_the_published_model(changes):
    card = model_card(published_contents(**changes))
    assert "paper reports" not in card.text
    if not changes.get("report", {"x": 1}).get("arguments", {}).get("llm", "").startswith("lmsys"):
        assert card.data.license is None or "config" in changes


class FakeApi:
    """The part of the Hub's API that an upload uses."""

    def __init__(self, exists=False, private=False, tags=(), files=()):
        self.calls, self.exists, self.private, self.tags, self.files = [], exists, private, tags, files

    def __call__(self):
        return self

    def repo_info(self, repo_id):
        if not self.exists:
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404", response=response)
        return SimpleNamespace(private=self.private)

    def list_repo_refs(self, repo_id):
        return SimpleNamespace(tags=[SimpleNamespace(name=tag) for tag in self.tags])

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        url = type("Url", (str,), {"repo_id": repo_id})
        return url(f"https://hub/{repo_id}")

    def list_repo_files(self, repo_id):
        return list(self.files)

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        self.calls.append(("upload", repo_id, {path.name for path in folder_path.iterdir()}, delete_patterns))
        return SimpleNamespace(oid="c0ffee")

    def create_tag(self, repo_id, tag, revision):
        self.calls.append(("tag", repo_id, tag, revision))


def test_push_creates_uploads_and_tags(saved, tmp_path, monkeypatch):
    api = FakeApi(files=["README.md", "modeling_mgllava.py", "attention_mgllava.py", "handler.py"])
    monkeypatch.setattr(upload, "HfApi", api)
    output = tmp_path / "out"
    result = run(saved, "--output", output, "--push", "org/name", "--private", "--no-verify")
    assert result.exit_code == 0, result.output
    assert f"Uploaded to https://hub/org/name, tag {TAG}" in result.output
    create, sent, tag = api.calls
    assert create == ("create", "org/name", True, True) and tag == ("tag", "org/name", TAG, "c0ffee")
    assert sent[:2] == ("upload", "org/name") and {"README.md", "modeling_mgllava.py"} <= sent[2]
    assert sent[3] == ["attention_mgllava.py"]
    assert '"org/name"' in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("exists", "is_private", "private"),
    [(False, False, False), (True, False, False), (True, True, False), (True, True, True)],
)
def test_upload_into_repositories_that_exist(tmp_path, monkeypatch, exists, is_private, private):
    api = FakeApi(exists, is_private, tags=["v0"], files=["model.safetensors"])
    said = []
    monkeypatch.setattr(upload, "HfApi", api)
    monkeypatch.setattr(upload.logger, "warning", said.append)
    (tmp_path / "config.json").touch()
    options = {"private": True} if private else {}
    assert upload.upload_repository(tmp_path, "org/name", "v1", **options) == "https://hub/org/name"
    # Whether a repository that exists is private is not changed.
    assert api.calls == [
        ("create", "org/name", True if private else None, True),
        ("upload", "org/name", {"config.json"}, ["model.safetensors"]),
        ("tag", "org/name", "v1", "c0ffee"),
    ]
    assert len(said) == 1 and "Deleted from org/name" in said[0] and "model.safetensors" in said[0]


def test_upload_that_fails_says_that_the_folder_is_complete(tmp_path, monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(upload, "HfApi", api)
    monkeypatch.setattr(api, "create_tag", lambda *given, **options: (_ for _ in ()).throw(OSError("no\nnetwork")))
    with pytest.raises(ConversionError, match=r"complete, but could not be uploaded to org/name \(no network\)"):
        upload.upload_repository(tmp_path, "org/name", "v1")


@pytest.mark.parametrize(
    ("api", "options", "message"),
    [
        (FakeApi(True, tags=[TAG]), ["--push", "org/name"], f"has a tag {TAG}, which users may have pinned"),
        (FakeApi(True), ["--push", "org/name", "--private"], "org/name exists and is public"),
        (FakeApi(), ["--private"], "--private applies to uploads: pass --push too"),
    ],
)
def test_impossible_uploads_are_refused_before_anything_is_written(
    api, options, message, saved, tmp_path, monkeypatch
):
    monkeypatch.setattr(upload, "HfApi", api)
    result = run(saved, "--output", tmp_path / "out", *options)
    assert result.exit_code == 1 and message in result.output
    assert not api.calls and not list(tmp_path.iterdir())


def test_error_names_a_model_that_does_not_exist(tmp_path):
    result = run("no/such-model", "--output", tmp_path / "out")
    assert result.exit_code == 1 and "MODEL: no/such-model is not a folder here" in result.output
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="It is an adapter: merge it"):
        export_repository(tmp_path / "adapter", tmp_path / "out")


def test_import_of_the_loading_check_does_not_hide_the_package():
    import mgllava.hub.loading_check

    assert sys.modules["mgllava"] is mgllava


@pytest.fixture
def loaded(monkeypatch):
    """What the loading check loads, in place of the Auto classes of transformers."""
    calls = []

    def record(name, method, result=None):
        def load(*arguments, trust_remote_code, **options):
            assert trust_remote_code is True
            calls.append((name, *arguments, *options.values(), torch.empty(0).device.type))
            return result

        monkeypatch.setattr(transformers, name, SimpleNamespace(**{method: load}))

    config = SimpleNamespace(auto_map={"AutoConfig": "a", "AutoModel": "b", "AutoModelForImageTextToText": "c"})
    record("AutoConfig", "from_pretrained", config)
    for name in ("AutoModel", "AutoModelForImageTextToText"):
        record(name, "from_config")
    for name in ("AutoImageProcessor", "AutoProcessor"):
        record(name, "from_pretrained")
    calls.append(config)
    return calls


@pytest.mark.parametrize("started", [False, True])
def test_loading_check_loads_all_that_has_code(loaded, tmp_path, monkeypatch, started):
    """Models without their weights, both image processors, the processor if there is one, and parts with code."""
    config = loaded.pop()
    tagger, detector = tmp_path / "box_detector" / "tagger", tmp_path / "box_detector" / "detector"
    for folder, content in ((tmp_path, "{}"), (tagger, '{"auto_map": {}}'), (detector, "{}")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(content)
    (tmp_path / "processor_config.json").write_text("{}")
    if started:
        monkeypatch.setitem(sys.modules, "mgllava", mgllava)
        monkeypatch.setattr(sys, "argv", ["loading_check.py", str(tmp_path)])
        runpy.run_path(str(verify._SCRIPT), run_name="__main__")
        assert sys.modules["mgllava"] is None
    else:
        loading_check.check(tmp_path)
    models = [(name, config, "meta") for name in ("AutoModel", "AutoModelForImageTextToText")]

    def of(folder):
        images = [("AutoImageProcessor", folder, backend, "cpu") for backend in ("torchvision", "pil")]
        return [("AutoConfig", folder, "cpu"), *models, *images]

    assert loaded == [*of(tmp_path), ("AutoProcessor", tmp_path, "cpu"), *of(tagger)]


@pytest.mark.parametrize(
    "error", [OSError("no network"), ConnectionError("refused\nby the host"), HFValidationError("Repo id must be a/b")]
)
def test_unreachable_hub_is_one_message(saved, tmp_path, monkeypatch, error):
    class Api:
        def repo_info(self, repo_id):
            raise error

    monkeypatch.setattr(upload, "HfApi", Api)
    result = run(saved, "--output", tmp_path / "out", "--push", "org/name")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "--push: the Hub cannot be asked about org/name" in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": ["mgllava"]}', '{"model_type": "mgllava", "text_config": 3}']
)
def test_broken_config_is_one_message(copied, tmp_path, content):
    (copied / "config.json").write_text(content)
    result = run(copied, "--output", tmp_path / "out")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), repr(result.exception)
    assert "error: " in result.output and not (tmp_path / "out").exists()


def test_hand_written_card_in_the_output_is_kept(saved, tmp_path):
    for options in ([], ["--overwrite"]):
        result = run(saved, "--output", tmp_path / "out", "--no-verify", *options)
        assert result.exit_code == 0, result.output
        (tmp_path / "out" / "README.md").write_text("my card")
        (tmp_path / "out" / "notes.txt").write_text("mine")
    result = run(saved, "--output", tmp_path / "out", "--no-verify", "--overwrite")
    assert (tmp_path / "out" / "README.md").read_text() == "my card"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
