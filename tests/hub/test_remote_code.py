"""Without the package, exported model folders load and compute bit-identical results."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mgllava import BoxDetector, MGLlavaForConditionalGeneration, MGLlavaProcessor, add_videos
from mgllava.hub import export_repository
from tests.hub import session
from tests.hub.conftest import FORKED, PYTHONS
from tests.hub.repositories import as_hub_cache
from tests.hub.test_saved_before import PICTURE, SMALL_MODEL
from tests.processing.detectors import OWLV2
from tests.processing.videos import make_frames, write


def assert_equal(remote, own, exact=True):
    """Compare tensors by name; those of a model that was saved again, with those of the first one.

    The latter may differ in the last bit, because the alignment of weights in a file decides which kernels run.
    """
    for name, value in remote.items():
        wanted = own[name.removeprefix("again.")]
        if not value.is_floating_point() or (exact and not name.startswith("again.")):
            assert torch.equal(value, wanted), name
        else:
            torch.testing.assert_close(value, wanted, msg=lambda text, name=name: f"{name}: {text}")


def python_files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*.py")}


def auto_maps(folder):
    """Return all `auto_map` of a model folder, by file."""
    maps = {}
    for path in sorted(Path(folder).rglob("*.json")):
        content = json.loads(path.read_text())
        for owner in (content, content.get("image_processor", {})) if isinstance(content, dict) else ():
            if isinstance(owner, dict) and "auto_map" in owner:
                maps.setdefault(str(path.relative_to(folder)), []).append(owner["auto_map"])
    return maps


@pytest.mark.parametrize("python", PYTHONS)
def test_all_model_folders_load_and_compute_the_same(
    python, families, slime_repository, tagger_repository, with_detector, without_package, tmp_path
):
    peft = pytest.importorskip("peft")
    model = MGLlavaForConditionalGeneration.from_pretrained(families["vicuna"])
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=r".*language_model.*\.[qv]_proj", init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    with_labels = tmp_path / "with-labels"
    processor = MGLlavaProcessor.from_pretrained(families["vicuna"])
    processor.box_detector = BoxDetector(["cat", "dog"], OWLV2)
    processor.save_pretrained(with_labels)
    exported_tagger = export_repository(tagger_repository, tmp_path / "ram-plus", verify=False)
    home = tmp_path / "hub-home"
    pinned, latest = "a" * 40, "b" * 40
    cached = as_hub_cache(with_detector, home / "hub", "org/mg-llava.tiny", {"v0.1.0": pinned, "main": latest})
    # The main branch is broken, which users of the tag must not notice.
    for path in (cached / "snapshots" / latest).rglob("*.py"):
        path.write_text("raise RuntimeError('not the pinned revision')\n")

    with_videos = tmp_path / "with-videos"
    model = MGLlavaForConditionalGeneration.from_pretrained(families["vicuna"])
    processor = MGLlavaProcessor.from_pretrained(families["vicuna"])
    add_videos(model, processor)
    model.save_pretrained(with_videos)
    processor.save_pretrained(with_videos)
    movie = tmp_path / "movie.mkv"
    movie.write_bytes(write(make_frames(6)))
    jobs = {family: ("mgllava", {"name": folder, "again": tmp_path / family}) for family, folder in families.items()}
    jobs |= {
        "other classes": ("other_classes", {"name": families["llama3"]}),
        "slime": ("mgllava", {"name": slime_repository, "again": tmp_path / "slime"}),
        "other classes of slime": ("other_classes", {"name": slime_repository}),
        "video": ("video", {"name": with_videos, "file": movie}),
        "ram_plus": ("ram_plus", {"name": tagger_repository, "again": tmp_path / "ram_plus"}),
        "detection": ("detection", {"name": with_detector, "again": tmp_path / "detection"}),
        "detection of labels": ("detection", {"name": with_labels}),
        "small model": ("question", {"name": SMALL_MODEL, "image": PICTURE}),
        "without its code": ("refused", {"name": SMALL_MODEL}),
        "adapter": ("adapter", {"name": families["vicuna"], "path": tmp_path / "adapter"}),
        "card": ("card", {"name": families["phi3"], "folder": families["phi3"].parent}),
        "slime card": ("card", {"name": slime_repository, "folder": slime_repository.parent}),
        "tagger card": ("card", {"name": exported_tagger, "folder": exported_tagger.parent}),
        "pinned": ("mgllava", {"name": "org/mg-llava.tiny", "revision": "v0.1.0"}),
        "pinned pipeline": ("other_classes", {"name": "org/mg-llava.tiny", "revision": "v0.1.0"}),
        "pinned detection": ("detection", {"name": "org/mg-llava.tiny", "revision": "v0.1.0"}),
    }
    results, said = without_package(python, jobs, home)

    exact = python in (FORKED, sys.executable)
    for name, (action, arguments) in jobs.items():
        tensors, facts = results[name]
        assert all(entry.startswith("transformers_modules:") for entry in facts.get("classes", ())), (name, facts)
        if action == "refused":
            assert len(facts["refused"]) == 2 and all("trust_remote_code=True" in said for said in facts["refused"])
            continue
        if action == "card":
            assert facts["printed"] == 1
            continue
        if "revision" in arguments:
            arguments = {"name": with_detector}
        own_arguments = {key: str(value) for key, value in arguments.items() if key != "again"}
        own_tensors, own_facts = getattr(session, action)(**own_arguments)
        assert_equal(tensors, own_tensors, exact)
        # In this process the installed package is used instead of the code in the folder.
        assert [entry.split(":")[1] for entry in facts["classes"]] == [
            entry.split(":")[1] for entry in own_facts["classes"]
        ]
        assert all(entry.startswith("mgllava:") for entry in own_facts["classes"]), own_facts
        if action == "ram_plus":
            assert [tag["label"] for tag in facts["pipeline"]] == [tag["label"] for tag in own_facts["pipeline"]]
        else:
            assert facts.get("pipeline") == own_facts.get("pipeline")
            assert facts.get("labels") == own_facts.get("labels")
        if "again" in arguments:
            folder = arguments["name"]
            saved = python_files(folder)
            copied = python_files(arguments["again"])
            assert copied and all(saved[path] == code for path, code in copied.items()), name
            if action != "detection":  # which saves the processor alone
                assert copied.keys() == {path for path in saved if path.parts[0] != "box_detector"}, name
                assert auto_maps(arguments["again"]) == auto_maps(folder), name
    for word in ("offline", "Connection", "huggingface.co/api", "not installed"):
        assert word not in said, said


def test_model_folder_has_the_code_of_its_family_only(families, slime_repository):
    assert sorted(path.name for path in slime_repository.glob("*.py")) == [
        "adapters_slime.py",
        "configuration_slime.py",
        "image_processing_slime.py",
        "image_text_processor_common.py",
        "images_common.py",
        "language_model_common.py",
        "modeling_slime.py",
        "pretrained_common.py",
        "processing_slime.py",
        "text_chunks_common.py",
    ]
    names = [path.name for path in families["vicuna"].glob("*.py")]
    assert len(names) <= 16 and all(name.endswith(("_mgllava.py", "_common.py")) for name in names)


def test_processor_keeps_trust_remote_code_for_its_detector(with_detector):
    loaded = MGLlavaProcessor.from_pretrained(with_detector, trust_remote_code=True)
    assert loaded._repository.trust_remote_code
