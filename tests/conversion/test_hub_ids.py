"""Checkpoints by their Hub ids, with a fake Hub, and the presets."""

import fnmatch
import http.server
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from mgllava.conversion import PRESETS, ConversionError, convert_ram_plus, fetch
from mgllava.conversion.detect import presets
from mgllava.conversion.ram_plus import TAG_LIST_URL, THRESHOLDS_URL
from mgllava.conversion.xtuner import XTUNER
from mgllava.conversion.xtuner.open_clip import open_high_res_tower
from mgllava.hub.card_sections import LICENSES
from mgllava.model_files import sources as model_sources
from mgllava.model_files.errors import UnreadableSourceError
from tests.ram_plus.golden import SOURCES

from .conftest import options_of, run


def _fetch(name, preset=None):
    return fetch.fetch_checkpoint(name, [XTUNER], PRESETS[preset] if preset else {})


class FakeHub:
    """Repositories in folders: lists their files, and records which ones are downloaded."""

    def __init__(self, root, cache):
        self.root, self.cache = root, cache
        self.online = True
        self.downloaded = []
        self.revisions = []

    def add(self, repository, files):
        for name, source in files.items():
            path = self.root / repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Path):
                shutil.copy(source, path)
            else:
                path.write_bytes(source)

    def _files(self, repository):
        folder = self.root / repository
        if not folder.is_dir():
            raise RepositoryNotFoundError(
                "404 Client Error.\n\nRepository Not Found", response=SimpleNamespace(headers={}, request=None)
            )
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def model_info(self, repository, revision=None):
        if not self.online:
            raise OfflineModeIsEnabled("no network")
        self.revisions.append(revision)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self._files(repository)])

    def snapshot_download(self, repository, revision, allow_patterns):
        folder = self.cache / repository
        if not self.online:
            if not folder.is_dir():
                raise OfflineModeIsEnabled("no network")
            return str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self._files(repository):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / repository / name, folder / name)
                self.downloaded.append(f"{repository}/{name}")
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(model_sources, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(fetch, "HfApi", lambda: hub)
    return hub


def test_only_checkpoint_of_a_repository_is_found(hub):
    hub.add("acme/model", {"README.md": b"", "sub/iter_10.pth": b"weights", "config.json": b"{}"})
    found = _fetch("acme/model")
    assert found.read_bytes() == b"weights" and hub.downloaded == ["acme/model/sub/iter_10.pth"]
    for name in (
        "acme/model/sub",
        "hf://acme/model/sub/iter_10.pth",
        "acme/model@v1/sub/iter_10.pth",
        "acme/model@v1",
    ):
        assert _fetch(name) == found
    assert hub.revisions == [None, None, None, "v1", "v1"]


def test_several_checkpoints_are_listed_and_nothing_is_downloaded(hub):
    files = {f"{model}/{file}": b"" for model in ("Vicuna-7B", "Vicuna_13B", "Phi3-mini") for file in ("iter_5.pth",)}
    hub.add("PhoenixZ/MG-LLaVA", {**files, "Vicuna_13B/pretrain.pth": b"", "logs/a.txt": b""})
    with pytest.raises(ConversionError) as error:
        _fetch("PhoenixZ/MG-LLaVA")
    assert str(error.value).splitlines()[1:] == [
        "  PhoenixZ/MG-LLaVA/Phi3-mini/iter_5.pth",
        "  PhoenixZ/MG-LLaVA/Vicuna-7B/iter_5.pth",
        "  PhoenixZ/MG-LLaVA/Vicuna_13B/iter_5.pth",
        "  PhoenixZ/MG-LLaVA/Vicuna_13B/pretrain.pth",
    ]
    assert hub.downloaded == []
    # The preset chooses one, if its name fits one only.
    assert _fetch("PhoenixZ/MG-LLaVA", "vicuna-7b").parent.name == "Vicuna-7B"
    with pytest.raises(ConversionError, match=r"several[^\n]*\n.*Vicuna_13B/iter_5\.pth\n.*/pretrain\.pth$"):
        _fetch("PhoenixZ/MG-LLaVA", "vicuna-13b")
    with pytest.raises(ConversionError, match=r"has no checkpoint other\.pth. It has:"):
        _fetch("PhoenixZ/MG-LLaVA/other.pth")


def test_deepspeed_folder_is_one_checkpoint(hub):
    names = ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    hub.add("acme/zero", {f"iter_10.pth/{name}": b"" for name in names} | {"iter_10.pth/zero_to_fp32.py": b""})
    found = _fetch("acme/zero")
    assert found.is_dir() and {path.name for path in found.iterdir()} >= set(names)


def test_wildcards_in_names_are_escaped_and_other_names_are_refused(hub, tmp_path):
    hub.add("acme/odd", {"a[1]/iter*.pth": b"star", "a[1]/iter_2.pth": b"two", "a1/iter_3.pth": b""})
    assert _fetch("acme/odd/a[1]/iter*.pth").read_bytes() == b"star"
    assert hub.downloaded == ["acme/odd/a[1]/iter*.pth"]
    for name in ("acme/odd/../../secret.pth", "../odd", "./acme/odd", "/acme/odd", "acme", "a b/c", "acme/odd//", ""):
        with pytest.raises(ConversionError, match="`checkpoint`"):
            _fetch(name)


def test_hub_that_cannot_be_reached(hub):
    hub.add("acme/model", {"iter_10.pth": b"weights"})
    hub.online = False
    for name in ("acme/model", "acme/model/iter_10.pth"):
        with pytest.raises(ConversionError, match=r"cannot be fetched from the Hub \(no network\)"):
            _fetch(name)
    hub.online = True
    with pytest.raises(ConversionError, match=r"acme/absent is not a folder here.*Repository Not Found"):
        _fetch("acme/absent")
    _fetch("acme/model")
    hub.online = False
    # Found in the cache.
    assert _fetch("acme/model").read_bytes() == _fetch("acme/model/iter_10.pth").read_bytes()
    with pytest.raises(ConversionError, match=r"acme/model has no iter_9\.pth"):
        _fetch("acme/model/iter_9.pth")


@pytest.mark.parametrize(("number", "more"), [(40, ""), (41, "\n  and 1 more")])
def test_long_lists_of_checkpoints_are_cut(hub, number, more):
    hub.add("acme/many", {f"iter_{index:02}.pth": b"" for index in range(number)})
    with pytest.raises(ConversionError) as error:
        _fetch("acme/many@v1")
    assert str(error.value).endswith("  acme/many@v1/iter_39.pth" + more)
    assert str(error.value).count("\n") == number


def test_repository_without_checkpoints_is_described(hub):
    hub.add("acme/other", {"model.onnx": b""})
    for name in ("acme/other", "acme/other/sub"):
        with pytest.raises(ConversionError) as error:
            _fetch(name)
        found = "(*.pth, *.pt)." if name == "acme/other" else "sub."
        assert str(error.value) == f"`checkpoint`: acme/other has no checkpoint {found}"


@pytest.mark.parametrize("safetensors", [True, False])
def test_pickled_weights_of_a_language_model_are_fetched_only_without_safetensors(hub, golden, safetensors):
    files = {path.name: path for path in (golden / "llm").iterdir()}
    weights = files.pop("model.safetensors")
    hub.add("acme/llm", {**files, "pytorch_model.bin": b"pickled"})
    if safetensors:
        hub.add("acme/llm", {"model.safetensors": weights})
    folder = model_sources.fetch_weights("acme/llm", "llm")
    assert (folder / "pytorch_model.bin").exists() != safetensors and (folder / "config.json").exists()
    assert ("acme/llm/model.safetensors" in hub.downloaded) == safetensors


def test_open_clip_weights_are_safetensors_if_there_are_any(hub, golden):
    config = golden / "convnext" / "open_clip_config.json"
    pickled = golden / "convnext" / "open_clip_pytorch_model.bin"
    hub.add("acme/clip", {"open_clip_config.json": config, "open_clip_pytorch_model.bin": pickled, "README.md": b""})
    for name in ("acme/clip", "hf-hub:acme/clip"):
        assert open_high_res_tower(name).depths == [1, 1, 2, 1]
    assert set(hub.downloaded) == {"acme/clip/open_clip_config.json", "acme/clip/open_clip_pytorch_model.bin"}
    hub.downloaded.clear()
    weights = torch.load(pickled, weights_only=True)
    save_file(weights, hub.root / "acme/clip/open_clip_model.safetensors")
    assert open_high_res_tower("acme/clip").architecture.startswith("convnext")
    assert set(hub.downloaded) == {"acme/clip/open_clip_config.json", "acme/clip/open_clip_model.safetensors"}


def test_open_clip_names_without_weights_on_the_hub_are_refused(monkeypatch):
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda architecture, tag: {"url": "https://elsewhere"})
    with pytest.raises(ConversionError, match="the weights of convnext_base:laion400m_s13b_b51k are not on the Hub"):
        open_high_res_tower("convnext_base:laion400m_s13b_b51k")


@pytest.mark.parametrize("name", ["a b/c", "a/b/c", "a", "./a/b", ".a/b", "/a/b", "hf://a", "hf://./a", ""])
def test_names_that_are_neither_folder_nor_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(UnreadableSourceError, match="`llm` must be a folder or a Hub id"):
        model_sources.fetch(name or tmp_path / "absent", "llm", ["*"])
    assert model_sources.fetch("c", "llm", ["*"]) == Path("c")


def test_hub_prefix_is_never_a_folder(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "llm").mkdir(parents=True)
    hub.add("acme/llm", {"config.json": b"{}"})
    assert model_sources.fetch("acme/llm", "llm", ["*"]) == Path("acme/llm")
    assert (model_sources.fetch("hf://acme/llm", "llm", ["*.json"]) / "config.json").is_file()


def test_revision_is_for_models_on_the_hub(tmp_path):
    model_sources.refuse_revision_of_folder(tmp_path, None)
    model_sources.refuse_revision_of_folder("acme/llm", "v1")
    with pytest.raises(ConversionError, match="`revision` is for models on the Hub"):
        model_sources.refuse_revision_of_folder(tmp_path, "v1")


def test_presets_are_the_models_of_the_paper():
    assert presets().items() >= PRESETS.items()
    named = {(values["llm"], values["prompt_template"]) for values in PRESETS.values()}
    assert named == {
        ("microsoft/Phi-3-mini-4k-instruct", "phi3"),
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("lmsys/vicuna-13b-v1.5", "vicuna"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("01-ai/Yi-1.5-34B-Chat", "yi"),
    }
    for values in PRESETS.values():
        assert {values["llm"], values["vision_tower"], values["high_res_tower"]} <= LICENSES.keys()


def _add_preset(hub, golden, preset):
    for argument, folder in (("llm", "llm"), ("vision_tower", "clip"), ("high_res_tower", "convnext")):
        hub.add(PRESETS[preset][argument], {path.name: path for path in (golden / folder).iterdir()})
    hub.add("PhoenixZ/MG-LLaVA", {f"{preset}/iter_10.pth": golden / "xtuner" / "iter_10.pth", "other/a.pth": b""})


def test_preset_converts_a_published_checkpoint(tmp_path, hub, golden, converted):
    _add_preset(hub, golden, "vicuna-7b")
    arguments = {"checkpoint": "PhoenixZ/MG-LLaVA", "preset": "vicuna-7b", "output": tmp_path / "out"}
    result = run("convert", *options_of(arguments))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    assert "PhoenixZ/MG-LLaVA/other/a.pth" not in hub.downloaded
    # The checkpoint has the language model, so only its config and tokenizer are fetched.
    assert f"{PRESETS['vicuna-7b']['llm']}/model.safetensors" not in hub.downloaded


def test_options_override_the_preset(tmp_path, hub, golden):
    _add_preset(hub, golden, "llama3-8b")
    arguments = {"checkpoint": golden / "xtuner" / "iter_10.pth", "preset": "llama3-8b", "output": tmp_path / "out"}
    # open_clip resolves the name to the preset's repository.
    given = {"llm": golden / "llm", "high_res_tower": "convnext_large_d_320:laion2b_s29b_b131k_ft_soup"}
    result = run("convert", *options_of({**arguments, **given, "prompt_template": "vicuna"}))
    assert result.exit_code == 0, result.output
    assert not [name for name in hub.downloaded if name.startswith("meta-llama")]
    assert f"{PRESETS['llama3-8b']['high_res_tower']}/open_clip_pytorch_model.bin" in hub.downloaded
    assert "USER:" in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_options_that_to_original_does_not_take():
    for option in (
        ["--preset", "yi-34b"],
        ["--dtype", "float16"],
        ["--lora-alpha", "3"],
        ["--trust-pickle"],
        ["--max-shard-size", "1GB"],
    ):
        result = run("convert", "--checkpoint", "x", "--output", "y", "--to-original", *option)
        assert result.exit_code == 1 and option[0] in result.output


def test_tagger_from_the_hub_with_texts_from_urls(tmp_path, hub):
    hub.add("xinyu1205/recognize-anything-plus-model", {"ram_plus_swin_large_14m.pth": SOURCES["checkpoint"]})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=SOURCES["tag_list"].parent)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    sizes = {name: SOURCES[name] for name in ("swin_config", "decoder_config")}
    start = {"checkpoint": "xinyu1205/recognize-anything-plus-model", **sizes}
    texts = {name: f"{url}/{SOURCES[name].name}" for name in ("tag_list", "thresholds")}

    def convert(output, **texts):
        return run("convert-ram-plus", *options_of({**start, **texts, "output": tmp_path / output}))

    try:
        result = convert("out", **texts)
        assert result.exit_code == 0, result.output
        plain = convert_ram_plus(**SOURCES, output=tmp_path / "plain")
        first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", plain))
        assert all(first[name].equal(second[name]) for name in second)
        assert (tmp_path / "out" / "config.json").read_text() == (plain / "config.json").read_text()
        result = convert("other", **{**texts, "tag_list": f"{url}/absent.txt"})
        assert result.exit_code == 1 and "cannot be downloaded (HTTP Error 404" in result.output
    finally:
        server.shutdown()
        server.server_close()  # otherwise connections wait for an answer
    result = convert("other", **texts)
    assert result.exit_code == 1 and "cannot be downloaded" in result.output
    result = convert("other")
    assert result.exit_code == 1 and TAG_LIST_URL in result.output and THRESHOLDS_URL in result.output
    assert not (tmp_path / "other").exists()
