"""Model folders of strangers: their files never lead outside them, and no file of this machine is published."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mgllava import BoxDetector, MGLlavaConfig, MGLlavaProcessor
from mgllava.conversion import ConversionError
from mgllava.hub import export_repository, upload
from mgllava.processing import box_detector_files_mgllava
from tests.hub.repositories import as_hub_cache
from tests.processing.detectors import OWLV2
from tests.processing.test_processing import small
from tests.tiny import tiny_config

SECRET = "what nobody else may read"


@pytest.fixture
def secret(tmp_path):
    """A detector of the user, which must not be published."""
    folder = shutil.copytree(OWLV2, tmp_path / "home" / "secret")
    (folder / "note.txt").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A model folder with a detector inside."""
    folder = tmp_path_factory.mktemp("original") / "model"
    processor = small()
    processor.box_detector = BoxDetector(["cat"], OWLV2)
    processor.save_pretrained(folder)
    tiny_config().save_pretrained(folder)
    return folder


@pytest.fixture
def clone(original, tmp_path):
    """Such a folder of a stranger."""
    return shutil.copytree(original, tmp_path / "clone")


def write(clone, **values):
    path = clone / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["box_detector_config"].update(values)
    path.write_text(json.dumps(settings))


def assert_secret_is_safe(folder):
    for path in folder.rglob("*"):
        assert not path.is_symlink() and path.name != "note.txt", path
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


PATHS = {
    "absolute": "{secret}",
    "relative": "../home/secret",
    "up inside": "./box_detector/../../home/secret",
    "up": "./..",
    "bundled absolute": "./{secret}/../secret",
    "home": "~/secret",
    "other home": "~root",
    "url": "file://{secret}",
    "scheme": "local-dir:{secret}",
    "windows": "C:\\secret",
    "windows inside": ".\\..\\home\\secret",
    "windows bundled": "./..\\home\\secret",
    "drive bundled": "./C:secret",
    "the repository itself": "./",
    "dots": "..",
    "null": "./box_detector/\0",
    "folder here": "secret",
    "folder here with owner": "home/secret",
    "link": "./box_detector/link",
    "folder with a link": "./box_detector/detector",
    "folder behind a link": "./box_detector/link/../link",
}


@pytest.mark.parametrize("part", ["tagger", "detector", "prompt_embeds"])
@pytest.mark.parametrize("kind", PATHS)
def test_paths_out_of_a_repository_are_refused(kind, part, secret, clone, tmp_path, monkeypatch):
    monkeypatch.chdir(secret.parent if kind == "folder here" else tmp_path)
    monkeypatch.setenv("HOME", str(secret.parent))
    (clone / "box_detector" / "link").symlink_to(secret)
    if kind == "folder with a link":
        (clone / "box_detector" / "detector" / "note.txt").symlink_to(secret / "note.txt")
    write(clone, **{part: PATHS[kind].format(secret=secret)})
    processor = MGLlavaProcessor.from_pretrained(clone)
    output = tmp_path / "output"
    for use in (
        lambda: processor.box_detector,
        processor.load_box_detector,
        processor.locate_box_detector,
        lambda: processor.save_pretrained(output),
        lambda: export_repository(clone, output, verify=False),
    ):
        with pytest.raises((ValueError, FileNotFoundError, ConversionError)) as caught:
            use()
        if "export" not in str(caught.traceback[-1]) and isinstance(caught.value, ValueError):
            assert "repository" in str(caught.value), caught.value
    if output.exists():
        assert_secret_is_safe(output)


def test_export_refuses_links_and_paths_out_of_the_folder(secret, families, tmp_path):
    def fresh():
        shutil.rmtree(tmp_path / "clone", ignore_errors=True)
        return shutil.copytree(families["vicuna"], tmp_path / "clone")

    clone = fresh()
    for name in ("README.md", "generation_config.json", "chat_template.jinja"):
        (clone / name).unlink(missing_ok=True)
        (clone / name).symlink_to(secret / "note.txt")
        with pytest.raises(ConversionError, match=f"`model`: .*{name}.* leads out of .* by a symbolic link"):
            export_repository(clone, tmp_path / "output", verify=False)
        (clone / name).unlink()
        clone = fresh()
    shutil.move(clone / "model.safetensors", secret / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"x": "../home/secret/model-00001-of-00001.safetensors"}}
    (clone / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="must name files next to it"):
        export_repository(clone, tmp_path / "output", verify=False)
    clone = fresh()
    settings = json.loads((clone / "processor_config.json").read_text())
    settings["box_detector_config"] = {"tagger": str(secret), "detector": "google/owlv2"}
    (clone / "processor_config.json").write_text(json.dumps(settings))
    # Options change parts of the configuration; the rest is still a stranger's.
    for options in ({}, {"detector": str(OWLV2)}, {"with_detector": True}):
        with pytest.raises(ConversionError, match=r"'tagger'.* is refused"):
            export_repository(clone, tmp_path / "output", verify=False, **options)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "architecture", ["local-dir:{secret}", "hf-hub:owner/name", "{secret}", "resnet50", "convnext/../x"]
)
def test_name_of_the_high_resolution_tower_is_not_a_path(architecture, secret):
    with pytest.raises(Exception, match="`architecture` must be the name of a ConvNeXt in timm"):
        MGLlavaConfig(high_res_vision_config={"architecture": architecture.format(secret=secret)})


def test_folders_that_the_user_sets_are_allowed(secret, clone, tmp_path):
    processor = MGLlavaProcessor.from_pretrained(clone)
    processor.box_detector_config = {"tagger": ["cat"], "detector": str(secret)}
    processor.save_pretrained(tmp_path / "set")
    processor = MGLlavaProcessor.from_pretrained(clone)
    processor.box_detector_config["detector"] = str(secret)  # in place
    processor.save_pretrained(tmp_path / "changed")
    config = {"tagger": ["cat"], "detector": str(secret)}
    MGLlavaProcessor.from_pretrained(clone, box_detector_config=config).save_pretrained(tmp_path / "given")
    for name in ("set", "changed", "given"):
        settings = json.loads((tmp_path / name / "processor_config.json").read_text())
        assert settings["box_detector_config"]["detector"] == "./box_detector/detector"
        assert (tmp_path / name / "box_detector" / "detector" / "note.txt").read_text() == SECRET


def test_links_out_of_the_folder_are_warned_of(secret, clone, monkeypatch):
    said = []
    monkeypatch.setattr("mgllava.processing.processing_mgllava.logger.warning", said.append)
    MGLlavaProcessor.from_pretrained(clone)
    assert not said
    (clone / "chat_template.jinja").unlink()
    (clone / "chat_template.jinja").symlink_to(secret / "note.txt")
    MGLlavaProcessor.from_pretrained(clone)
    assert len(said) == 1 and "chat_template.jinja" in said[0] and "links to files outside" in said[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tagger": 5}, "must have a string as 'tagger', got 5"),
        ({"detector": {"x": 1}}, "must have a string as 'detector'"),
        ({"detector": ["cat"]}, "must have a string as 'detector'"),
        ({"detector": "org/name", "detector_revision": "../.."}, "must be a branch, a tag or a commit"),
        ({"detector_revision": "main"}, "must be None unless"),
        ({"mode": "quick"}, "`mode` must be one of"),
    ],
)
def test_other_wrong_values_are_named(values, message, clone):
    write(clone, **values)
    with pytest.raises(ValueError, match=message):
        MGLlavaProcessor.from_pretrained(clone).load_box_detector()


def test_links_in_a_folder_of_the_user_are_refused_on_saving(secret, tmp_path):
    tagger = shutil.copytree(OWLV2, tmp_path / "clone")
    (tagger / "config.txt").symlink_to(secret / "note.txt")
    processor = small()
    processor.box_detector = BoxDetector(["cat"], tagger)
    with pytest.raises(ValueError, match=r"config.txt' leads out of .* replace it by a copy"):
        processor.save_pretrained(tmp_path / "output")
    assert_secret_is_safe(tmp_path / "output")


def test_links_of_the_hubs_cache_are_followed(clone, tmp_path):
    """Snapshots hold links to blobs; tested by folder and by id, at the top and in a subfolder."""
    whole = tmp_path / "whole"
    shutil.copytree(clone, whole / "sub")
    shutil.copytree(clone, whole, dirs_exist_ok=True)
    commit = "c" * 40
    cached = as_hub_cache(whole, tmp_path / "cache", "org/name", {"main": commit})
    (cached / "blobs").mkdir()
    for number, path in enumerate(sorted((cached / "snapshots").rglob("*"))):
        if path.is_file():
            blob = path.rename(cached / "blobs" / str(number))
            path.symlink_to(os.path.relpath(blob, path.parent))
    options = {"cache_dir": tmp_path / "cache"}
    for name, given in (("org/name", options), (cached / "snapshots" / commit, {})):
        for subfolder in ("", "sub"):
            processor = MGLlavaProcessor.from_pretrained(name, subfolder=subfolder, **given)
            assert processor.box_detector.config["detector"].endswith(f"{subfolder}/box_detector/detector")
            processor.save_pretrained(tmp_path / "again")
            assert (tmp_path / "again" / "box_detector" / "detector" / "config.json").is_file()
            shutil.rmtree(tmp_path / "again")
    assert processor._repository.revision == "main"
    assert MGLlavaProcessor.from_pretrained("org/name", **options)._repository.revision == commit


def test_arguments_of_from_pretrained_apply_to_the_detector(clone, tmp_path, monkeypatch):
    shutil.move(clone, tmp_path / "whole" / "sub")
    old, new = "a" * 40, "b" * 40
    as_hub_cache(tmp_path / "whole", tmp_path / "cache", "org/name", {"v1": old, "main": new})
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path / "whole")

    monkeypatch.setattr(box_detector_files_mgllava, "snapshot_download", download)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True, "token": "secret"}
    processor = MGLlavaProcessor.from_pretrained("org/name", subfolder="sub", revision="v1", **options)
    # The tag is moved before the detector is needed.
    (tmp_path / "cache" / "models--org--name" / "refs" / "v1").write_text(new)
    assert processor.box_detector is not None
    inside = "sub/box_detector/detector"
    assert asked[0] == (
        "org/name",
        {"revision": old, "allow_patterns": [inside, f"{inside}/*"], "force_download": False, **options},
    )


def test_parts_on_the_hub_are_pinned(tmp_path):
    first, second = "a" * 40, "b" * 40
    cache = tmp_path / "cache"
    as_hub_cache(OWLV2, cache, "org/detector", {"main": first, "v2": second})
    processor = small()
    processor.save_pretrained(tmp_path / "bare")
    for given, commit in (({}, first), ({"detector_revision": "v2"}, second), ({"detector_revision": first}, first)):
        # The commit is known from the cache, before and after loading.
        processor = MGLlavaProcessor.from_pretrained(tmp_path / "bare", cache_dir=cache)
        processor.box_detector_config = {"tagger": ["cat"], "detector": "org/detector", **given}
        processor.save_pretrained(tmp_path / "unused")
        assert processor.box_detector.config["detector_revision"] == commit
        processor.save_pretrained(tmp_path / "used")
        processor.box_detector = BoxDetector(["cat"], "org/detector", cache_dir=cache, **given)
        processor.save_pretrained(tmp_path / "set")
        for name in ("unused", "used", "set"):
            config = json.loads((tmp_path / name / "processor_config.json").read_text())["box_detector_config"]
            assert (config["detector"], config["detector_revision"]) == ("org/detector", commit), name
            assert not (tmp_path / name / "box_detector" / "detector").exists()
    # The branch moves to another commit; the saved one is still loaded.
    (cache / "models--org--detector" / "refs" / "main").write_text(second)
    shutil.rmtree(cache / "models--org--detector" / "snapshots" / second)
    loaded = MGLlavaProcessor.from_pretrained(tmp_path / "used", cache_dir=cache)
    assert loaded.box_detector.config["detector_revision"] == first


@pytest.mark.parametrize("revision", ["../../x", "/x", "~", "", 5, "a\\b"])
def test_revision_is_not_a_path(revision):
    with pytest.raises(ValueError, match="`detector_revision` must be a branch, a tag or a commit"):
        BoxDetector(["cat"], "org/detector", detector_revision=revision)


def test_revision_of_a_folder_and_unknown_options_are_refused():
    with pytest.raises(ValueError, match="`detector_revision` must be None unless"):
        BoxDetector(["cat"], OWLV2, detector_revision="main")
    with pytest.raises(ValueError, match="`tagger_revision` must be None unless"):
        BoxDetector(["cat"], OWLV2, tagger_revision="main")
    with pytest.raises(TypeError, match=r"got \['devise'\]"):
        BoxDetector(["cat"], OWLV2, devise="cpu")


def test_hostile_embeddings_are_refused(clone, tmp_path):
    processor = MGLlavaProcessor.from_pretrained(clone)
    processor.detect(torch.zeros(3, 20, 20, dtype=torch.uint8))
    processor.save_pretrained(clone)
    path = clone / "box_detector" / "prompt_embeds.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata={**metadata, "prompts": '["a", "a"]'})
    with pytest.raises(ValueError, match="one embedding for each prompt"):
        MGLlavaProcessor.from_pretrained(clone).load_box_detector()


USERS_FILES = [
    "handler.py",
    "adapters/a.safetensors",
    "tools/modeling_mgllava.py",
    "my_mgllava_tools.py",
    "lora.safetensors",
]
STALE_FILES = [
    "attention_mgllava.py",
    "image_text_processor_common.py",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "box_detector/tagger/tag_layers_ram_plus.py",
    "box_detector/detector/model.safetensors",
]


def test_upload_deletes_stale_code_and_weights_but_no_file_of_the_user(tmp_path):
    new = [tmp_path / "model.safetensors", tmp_path / "box_detector" / "tagger" / "modeling_ram_plus.py"]
    for path in new:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    uploaded = [*USERS_FILES, *STALE_FILES, *(path.relative_to(tmp_path).as_posix() for path in new)]
    assert upload.stale_files(uploaded, tmp_path) == sorted(STALE_FILES)
