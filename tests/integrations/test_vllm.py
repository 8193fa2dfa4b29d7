"""The parts of the vLLM plugin that need no vLLM; `test_vllm_engine.py` tests the others with a stand-in."""

import asyncio
import base64
import configparser
import copy
import io
import json
import re
import sys
import threading
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import mgllava
from mgllava.families import FAMILIES
from mgllava.integrations.vllm.box_finder import BoxFinder
from mgllava.integrations.vllm.boxed_images import (
    BoxedImage,
    as_parts,
    boxed_images,
    boxes_in_parts,
    digest,
    run_lengths,
)
from mgllava.integrations.vllm.command import read_engine_options, run_vllm, vllm_arguments
from mgllava.integrations.vllm.options import PluginOptions
from mgllava.integrations.vllm.requests import BoxesField, RequestReader, boxes_into_parts
from mgllava.integrations.vllm.routing import ImageRouter
from mgllava.integrations.vllm.support import check_config, drops_tokens
from mgllava.serving.image_urls import ImageHosts
from mgllava.serving.limits import ServingLimits
from tests.tiny import one_slime_prompt, slime_inputs, tiny_config, tiny_slime

IMAGE = PIL.Image.linear_gradient("L").resize((30, 20)).rotate(30).convert("RGB")
BOXES = [[1, 2, 11, 12], [3, 4, 9, 18.5]]


def test_the_plugin_is_an_entry_point():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    module, _, name = config["options.entry_points"]["vllm.general_plugins"].strip().split("= ")[1].partition(":")
    assert (module, name) == ("mgllava.integrations.vllm", "register")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


@pytest.mark.parametrize(
    ("images", "boxes", "expected"),
    [
        (IMAGE, None, [None]),
        ([IMAGE], BOXES, [BOXES]),
        (IMAGE, [BOXES], [BOXES]),
        ([IMAGE, None], [None, []], [None, []]),
        ({"image": IMAGE, "boxes": torch.tensor([[1, 2, 11, 12]])}, None, [[[1, 2, 11, 12]]]),
        ([{"image": IMAGE, "boxes": BOXES}, IMAGE], [None, {"boxes": BOXES, "scores": [1, 0]}], None),
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), [[], BOXES], [[], BOXES]),
    ],
    ids=range(7),
)
def test_images_and_boxes_become_items(images, boxes, expected):
    items = boxed_images(images, boxes)
    expected = expected or [BOXES, {"boxes": BOXES, "scores": [1, 0]}]
    assert [item.boxes for item in items] == expected
    assert boxed_images(items) == items


@pytest.mark.parametrize(
    ("images", "boxes", "error"),
    [
        ([{"image": IMAGE, "boxes": BOXES}], [BOXES], r"`boxes\[0\]` must be None"),
        ([IMAGE, IMAGE], [BOXES], "one entry per image"),
        ({"image": IMAGE, "bxes": BOXES}, None, "must have the keys 'image' and 'boxes'"),
        ({"image": IMAGE, "boxes": [1, 2, 3, 4]}, None, "Wrap it"),
    ],
    ids=range(4),
)
def test_wrong_boxes_are_named(images, boxes, error):
    with pytest.raises(ValueError, match=error):
        boxed_images(images, boxes)


def test_items_with_other_boxes_or_texts_have_other_names():
    texts = [
        BoxedImage(IMAGE, boxes).company()
        for boxes in (None, [], BOXES, BOXES[::-1], BOXES[:1], [[1.0, 2, 11, 12]], {"boxes": BOXES})
    ]
    texts += [BoxedImage(IMAGE, None, text_ids=ids).company() for ids in ((), (1, 2), (12,), (2, 1))]
    assert len(set(texts)) == len(texts)
    assert BoxedImage(None, {"labels": [1], "boxes": []}).company() == (
        BoxedImage(IMAGE, {"boxes": [], "labels": [1]}).company()
    )


def test_digests_tell_images_apart():
    turned, clear = IMAGE.copy(), IMAGE.copy()
    turned.getexif()[0x0112] = 6
    clear.info["transparency"] = (0, 128, 128)
    array = np.asarray(IMAGE)
    images = [
        IMAGE,
        IMAGE.rotate(180),
        turned,
        clear,
        IMAGE.resize((20, 30)),
        IMAGE.convert("L"),
        array,
        array[:, ::-1],
    ]
    images += [torch.tensor(array), SimpleNamespace(original_bytes=b"a"), SimpleNamespace(original_bytes=b"b")]
    images += [torch.tensor(array).bfloat16(), torch.tensor(array).float(), array.astype("int8"), array.reshape(-1)]
    palette = PIL.Image.new("P", (2, 2))
    other = palette.copy()
    palette.putpalette([1, 2, 3])
    other.putpalette([3, 2, 1])
    images += [palette, other]
    digests = [digest(image) for image in images]
    assert len({*digests}) == len(digests)
    assert digests == [digest(image) for image in images] and digest(IMAGE.copy()) == digests[0]


def test_videos_in_requests_are_refused():
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    reader = RequestReader(ImageHosts(), PluginOptions(limits=ServingLimits(videos=1)), with_boxes=True)
    with pytest.raises(
        ValueError, match=r"`messages\[0\]\.content\[0\]` must be absent: the engine vLLM takes no vid"
    ):
        asyncio.run(reader.read([{"role": "user", "content": [part]}]))


def test_blocks_of_transformers_become_parts_of_vllm(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    url = {"type": "image_url", "image_url": {"url": "https://a/b.png", "detail": "low"}}
    blocks = [
        {"type": "image", "image": IMAGE, "boxes": BOXES},
        {"type": "image", "url": "https://a/b.png"},
        {"type": "image", "base64": "QUJD", "mime_type": "image/webp"},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {**url, "image_url": {**url["image_url"], "boxes": BOXES}},
        url,
        {"type": "text", "text": "a"},
        "b",
        {"type": "image_url", "image_url": "https://a/b.png"},
    ]
    assert as_parts(["no message", {"role": "user"}]) == ["no message", {"role": "user"}]
    (unnamed,) = as_parts([{"role": "user", "content": ({"type": "image", "base64": "QUJD"},)}])[0]["content"]
    assert unnamed == {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    parts = as_parts([{"role": "user", "content": blocks}, {"role": "assistant", "content": "b"}])[0]["content"]
    assert parts[0] == {"type": "image_pil", "image_pil": IMAGE, "boxes": BOXES}
    assert parts[1] == {"type": "image_url", "image_url": {"url": "https://a/b.png"}}
    assert parts[2]["image_url"]["url"] == "data:image/webp;base64,QUJD"
    assert parts[3]["image_pil"].size == IMAGE.size
    assert parts[4] == {**url, "boxes": BOXES} and parts[5:] == blocks[5:]
    for block in ({"type": "image"}, {"type": "image", "image": IMAGE, "url": "x"}, {**blocks[4], "boxes": []}):
        with pytest.raises(ValueError, match=r"must have one of|got both"):
            as_parts([{"role": "user", "content": [block]}])


def test_boxes_are_read_from_parts():
    url = {"type": "image_url", "image_url": {"url": "u"}}
    parts = [
        {**url, "boxes": BOXES},
        {"type": "text", "text": "a"},
        url,
        {"image_pil": None, "uuid": "x", "boxes": []},
        {"type": "input_image", "image_url": "u"},
        "c",
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    assert boxes_in_parts(messages) == [BOXES, None, [], None]
    with pytest.raises(ValueError, match="next to an image"):
        boxes_in_parts([{"role": "user", "content": ({"type": "text", "text": "a", "boxes": BOXES},)}])


def test_prompts_with_and_without_runs_are_the_same():
    assert run_lengths([1, 9, 5, 9, 9, 2], 9, [4, 2, 1]) == [1, 9, 5, 9, 9, 2]
    assert run_lengths([1, 9, 9, 9, 9, 5, 9, 9, 9, 2], 9, [4, 2, 1]) == [1, 9, 5, 9, 9, 2]
    assert run_lengths([1, 2], 9, []) == [1, 2]
    for ids, lengths in (([9, 9], [1]), ([9, 9, 5, 9], [3, 1]), ([9, 5, 9, 9, 9], [3, 1])):
        with pytest.raises(ValueError, match="must have one placeholder"):
            run_lengths(ids, 9, lengths)


class Detector:
    """A processor whose detector notes its batches, and fails on images that are None."""

    box_detector_config = None

    def __init__(self, box_detector=True):
        self.box_detector, self.batches, self.may_run = box_detector, [], threading.Event()

    def detect(self, images):
        self.batches.append(list(images))
        self.may_run.wait(10)
        if None in images:
            raise ValueError("not an image")
        return [{"boxes": torch.tensor([[image, 0.5, 1, 1]]), "scores": torch.tensor([1.0])} for image in images]


def test_boxes_of_waiting_images_are_found_together_and_once():
    processor = Detector()
    finder = BoxFinder(processor, PluginOptions(box_detector_batch_size=3, remembered_images=6))
    futures = [finder.submit(str(image), image) for image in (0, 1, 2, 2, 3, 4)]
    processor.may_run.set()
    found = [future.result(10) for future in futures]
    assert [boxes["boxes"][0][0] for boxes in found] == [0, 1, 2, 2, 3, 4]
    assert json.dumps(found) and sorted(image for batch in processor.batches for image in batch) == [0, 1, 2, 3, 4]
    assert max(map(len, processor.batches)) == 3
    assert finder.submit("3", None).result(10) == found[4]
    for image in range(10, 16):
        finder.submit(str(image), image).result(10)
    assert finder.submit("0", 7).result(10)["boxes"][0][0] == 7, "forgotten, as more recent ones are remembered"


def test_an_image_that_cannot_be_read_fails_alone():
    processor = Detector()
    finder = BoxFinder(processor, PluginOptions())
    futures = [finder.submit(name, image) for name, image in (("a", 0), ("b", 1), ("c", None))]
    processor.may_run.set()
    assert [future.result(10)["boxes"][0][0] for future in futures[:2]] == [0, 1]
    with pytest.raises(ValueError, match="not an image"):
        futures[2].result(10)
    assert finder.submit("c", 5).result(10)["boxes"][0][0] == 5, "an error is not remembered"


@pytest.mark.parametrize(("device", "config"), [("cpu:0", {}), ("cpu:0", None), (None, {})])
def test_the_detector_is_placed_once_where_the_operator_wants_it(device, config):
    processor, loaded = Detector(), []
    processor.box_detector_config = config
    processor.load_box_detector = lambda device: loaded.append(device)
    processor.may_run.set()
    finder = BoxFinder(processor, PluginOptions(box_detector_device=device))
    for image in range(3):
        finder.submit(str(image), image).result(10)
    assert loaded == ([device] if device and config is not None else [])


def test_without_a_detector_no_boxes_are_found():
    assert BoxFinder(Detector(box_detector=None), PluginOptions()).submit("a", 1).result(10) is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"detector": True}, "must have options among box_detector, .* got detector"),
        ({"max_boxes": 0}, "'max_boxes'.* at least 1, got 0"),
        ({"remembered_images": True}, "'remembered_images'.* got True"),
        ({"box_detector": "no"}, "'box_detector'.* true or false, got 'no'"),
        ({"box_detector_device": 1}, "'box_detector_device'.* must be a string, got 1"),
        ({"router_device": 0}, "'router_device'.* must be a string, got 0"),
        ({"allowed_image_hosts": 0}, "'allowed_image_hosts'.* must be a string, got 0"),
        ({"box_detector_batch_size": 1.5}, "'box_detector_batch_size'.* must be a whole number, .* got 1.5"),
        ([], "must be a dict of options"),
    ],
    ids=range(9),
)
def test_wrong_options_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        PluginOptions.read({"mgllava": options})


def test_options_have_the_defaults_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| \S", page, re.MULTILINE))
    options = PluginOptions.read({}).as_dict()
    for name in ("box_detector", "box_detector_batch_size", "remembered_images", "max_boxes"):
        assert json.loads(rows[name].strip("`").replace(",", "")) == options[name], name
    for name in ("box_detector_device", "router_device"):
        assert rows[name] == "the accelerator" and options[name] is None


def test_options_survive_the_way_through_a_command_line():
    options = PluginOptions(box_detector=False, limits=ServingLimits(images=2), allowed_image_hosts="none")
    assert PluginOptions.read(json.loads(json.dumps({"mgllava": options.as_dict()}))) == options
    assert PluginOptions.read({}) == PluginOptions.read(None) == PluginOptions()


def options_of(words):
    """Read a command line of vLLM."""
    found, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, found[word] = word, []
        else:
            found[name].append(word)
    return found


def test_options_of_the_command_become_those_of_vllm(tmp_path):
    (tmp_path / "model").mkdir()
    words = vllm_arguments(
        str(tmp_path / "model"),
        ServingLimits(images=2, boxes=50),
        read_engine_options('{"enforce_eager": true, "tensor_parallel_size": 2, "hf_overrides": {"a": 1}}'),
        revision="v1",
        dtype="bfloat16",
        api_keys=["a", "b"],
        use_box_detector=False,
        enable_cors=True,
        allowed_image_hosts="none",
        bits=None,
        device="auto",
    )
    found = options_of(words)
    assert found["--model"] == [str(tmp_path / "model")] and found["--served-model-name"] == ["model"]
    assert found["--revision"] == found["--tokenizer-revision"] == ["v1"] and found["--dtype"] == ["bfloat16"]
    assert found["--api-key"] == ["a", "b"] and found["--enforce-eager"] == [] and "--trust-remote-code" not in found
    assert json.loads(found["--limit-mm-per-prompt"][0]) == {"image": 2}
    assert (found["--tensor-parallel-size"], json.loads(found["--hf-overrides"][0])) == (["2"], {"a": 1})
    plugin = PluginOptions.read(json.loads(found["--additional-config"][0]))
    assert (plugin.box_detector, plugin.max_boxes, plugin.limits.images) == (False, 50, 2)
    assert plugin.allowed_image_hosts == "none"


def test_all_options_of_the_command_have_a_counterpart_or_are_refused():
    words = vllm_arguments(
        "a/b",
        ServingLimits(),
        {"additional_config": {"other": 1, "mgllava": {"max_boxes": 7}}, "enable_prefix_caching": False},
        host="0.0.0.0",
        port=81,
        trust_remote_code=True,
        chat_template_kwargs='{"a": 1}',
        served_model_name="m",
        log_level="INFO",
        compile=True,
    )
    found = options_of(words)
    given = {"--model": "a/b", "--host": "0.0.0.0", "--port": "81", "--dtype": "auto", "--served-model-name": "m"}
    given |= {"--default-chat-template-kwargs": '{"a": 1}', "--uvicorn-log-level": "info"}
    given |= {"--middleware": f"{BoxesField.__module__}.BoxesField"}
    assert {name: found[name] for name in given} == {name: [value] for name, value in given.items()}
    assert found["--trust-remote-code"] == found["--no-enable-prefix-caching"] == []
    assert not {"--revision", "--tokenizer-revision", "--api-key", "--allowed-origins"} & set(found)
    config = json.loads(found["--additional-config"][0])
    assert config["other"] == 1 and PluginOptions.read(config).max_boxes == 7
    (origins,) = options_of(vllm_arguments("a/b", ServingLimits(), {}, enable_cors=True))["--allowed-origins"]
    assert json.loads(origins) == ["*"]
    with pytest.raises(TypeError, match="unexpected options: size"):
        vllm_arguments("a/b", ServingLimits(), {}, size=1)
    defaults = options_of(vllm_arguments("a/b", ServingLimits(), {}))
    assert (defaults["--host"], defaults["--port"]) == (["localhost"], ["8000"])
    assert defaults["--served-model-name"] == ["a/b"] and defaults["--uvicorn-log-level"] == ["warning"]
    plugin = PluginOptions.read(json.loads(defaults["--additional-config"][0]))
    assert (plugin.box_detector, plugin.allowed_image_hosts) == (True, "public")


def test_limits_that_vllm_cannot_keep_are_refused():
    kept = {"images", "image_bytes", "image_side", "pixels", "boxes", "image_timeout"}
    for limit in fields(ServingLimits):
        limits = ServingLimits(**{limit.name: limit.default + 1})
        if limit.name in kept:
            vllm_arguments("a/b", limits, {})
        else:
            with pytest.raises(ValueError, match=f"`{limit.name}` must be left out"):
                vllm_arguments("a/b", limits, {})


@pytest.fixture
def server_of_vllm(tmp_path, monkeypatch):
    """A package with the name of vLLM, whose server writes its command line."""
    folder = tmp_path / "vllm" / "entrypoints" / "openai"
    folder.mkdir(parents=True)
    for name in (folder, *folder.parents[:2]):
        (name / "__init__.py").touch()
    written = tmp_path / "arguments.json"
    code = f"import json, sys\nassert __name__ == '__main__'\njson.dump(sys.argv, open({str(written)!r}, 'w'))\n"
    (folder / "api_server.py").write_text(code)
    monkeypatch.setattr(sys, "argv", ["mgllava", "serve"])
    monkeypatch.syspath_prepend(str(tmp_path))
    yield written
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def test_the_server_of_vllm_runs_in_this_process(server_of_vllm):
    run_vllm("a/b", engine_options='{"max_num_seqs": 4}', limits=ServingLimits(), api_keys=["secret"])
    arguments = json.loads(server_of_vllm.read_text())
    assert arguments[1:] == vllm_arguments("a/b", ServingLimits(), {"max_num_seqs": 4}, api_keys=["secret"])
    assert arguments[arguments.index("--max-num-seqs") :][:2] == ["--max-num-seqs", "4"]


def test_a_missing_vllm_is_said_after_wrong_options(monkeypatch):
    monkeypatch.setattr("mgllava.integrations.vllm.command.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`engine_options` must be a JSON object, got '\{'"):
        run_vllm("a/b", engine_options="{", limits=ServingLimits())
    with pytest.raises(ImportError, match="`--engine vllm` needs vLLM"):
        run_vllm("a/b", limits=ServingLimits())


@pytest.mark.parametrize(
    ("options", "engine_options", "error"),
    [
        ({"bits": 4}, None, "`bits` must be left out with `--engine vllm`, got 4"),
        ({"device": "cuda:1"}, None, "`device` must be left out"),
        ({"attn_implementation": "sdpa"}, None, "`attn_implementation` must be left out"),
        ({"allowed_hosts": ["x"]}, None, "`allowed_hosts` must be left out"),
        ({"default_seed": 1}, None, "`default_seed` must be left out"),
        ({"limits": ServingLimits(concurrent_requests=3)}, None, "`concurrent_requests` must be left out"),
        ({"limits": ServingLimits(request_bytes=3)}, None, "`request_bytes` must be left out"),
        ({"limits": ServingLimits(videos=1)}, None, "`videos` must be left out with `--engine vllm`.*takes no videos"),
        ({"num_frames": 4}, None, "`num_frames` must be left out"),
        ({"api_keys": [" "]}, None, "`api_keys` must not be empty"),
        ({"allowed_image_hosts": "*"}, None, "`allowed_image_hosts` must be"),
        ({"chat_template_kwargs": "[]"}, None, "`chat_template_kwargs` must be a JSON object"),
        ({"compile": True}, '{"enforce_eager": true}', "`compile` must be left out"),
        ({}, '{"port": 1}', "`engine_options` must not have port"),
        ({}, "[]", "`engine_options` must be a JSON object"),
        ({}, '{"additional_config": {"mgllava": {"a": 1}}}', "must have options among"),
    ],
    ids=range(16),
)
def test_options_without_a_counterpart_are_refused_by_name(options, engine_options, error):
    limits = options.pop("limits", ServingLimits())
    with pytest.raises(ValueError, match=error):
        vllm_arguments("a/b", limits, read_engine_options(engine_options), **options)


def parts_of(*parts, **fields):
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}], **fields}).encode()


def test_boxes_of_a_request_move_into_its_parts():
    part, text = {"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "a"}
    inside = {"type": "image_url", "image_url": {"url": "u", "boxes": BOXES}}
    moved = json.loads(boxes_into_parts(parts_of(part, text, part, inside, boxes=[BOXES, None, None])))
    assert [entry.get("boxes") for entry in moved["messages"][0]["content"]] == [BOXES, None, None, BOXES]
    assert "boxes" not in moved and moved["messages"][0]["content"][3]["image_url"] == {"url": "u"}
    assert boxes_into_parts(parts_of(part)) == parts_of(part)
    for body in (b'{"boxes"', b'["boxes"]', b'{"text": "boxes"}'):
        assert boxes_into_parts(body) == body
    untyped = json.loads(boxes_into_parts(parts_of({"image_url": "u", "uuid": "x"}, boxes=[BOXES])))
    assert untyped["messages"][0]["content"][0]["boxes"] == BOXES
    responses = {"input": [{"content": [{"type": "input_image", "image_url": "u"}]}, "text", {"content": None}]}
    for messages in (responses, {"messages": [{"content": [{"type": "image", "url": "u"}, "text", text]}]}):
        moved = json.loads(boxes_into_parts(json.dumps({**messages, "boxes": [BOXES]}).encode()))
        ((message, *_),) = moved.values()
        assert message["content"][0]["boxes"] == BOXES
    assert json.loads(boxes_into_parts(b'{"input": "a", "boxes": []}')) == {"input": "a"}
    for body, error in (
        (parts_of(part, boxes=[]), "one entry per image .* got 0 for 1 images"),
        (parts_of(part, boxes={"a": 1}), "got no list"),
        (parts_of({**part, "boxes": BOXES}, boxes=[BOXES]), r"`boxes\[0\]` must be null"),
        (parts_of({**inside, "boxes": BOXES}), "got both"),
    ):
        with pytest.raises(ValueError, match=error):
            boxes_into_parts(body)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_middleware_passes_on_whole_bodies(is_wrong):
    part = {"type": "image_url", "image_url": {"url": "u"}}
    body = parts_of(part, boxes=[] if is_wrong else [BOXES])
    pieces = [
        {"type": "http.request", "body": body[:20], "more_body": True},
        {"type": "http.request", "body": body[20:]},
        {"type": "http.disconnect"},
    ]
    seen, sent = {}, []

    async def app(scope, receive, send):
        seen.update(scope=scope, body=(await receive())["body"], after=await receive())

    async def receive():
        return pieces.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(len(body)).encode()), (b"x", b"y")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
    asyncio.run(BoxesField(app)(scope, receive, send))
    if is_wrong:
        assert seen == {} and [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        assert (sent[0]["status"], dict(sent[0]["headers"])) == (400, {b"content-type": b"application/json"})
        error = json.loads(sent[1]["body"])["error"]  # in vLLM's form
        assert (error["type"], error["code"]) == ("BadRequestError", 400) and "one entry per image" in error["message"]
        return
    assert json.loads(seen["body"])["messages"][0]["content"][0]["boxes"] == BOXES
    assert dict(seen["scope"]["headers"]) == {b"content-length": str(len(seen["body"])).encode(), b"x": b"y"}
    assert seen["after"] == {"type": "http.disconnect"} and sent == []


@pytest.mark.parametrize("change", [{"type": "websocket"}, {"method": "GET"}, {"path": "/health"}], ids=range(3))
def test_the_middleware_leaves_other_requests_alone(change):
    passed = []

    async def app(*arguments):
        passed.append(arguments)

    scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": [], **change}
    asyncio.run(BoxesField(app)(scope, "receive", "send"))
    assert passed == [(scope, "receive", "send")]


def test_the_middleware_drops_requests_whose_client_is_gone():
    pieces = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return pieces.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": []}
    asyncio.run(BoxesField(None)(scope, receive, None))
    assert not pieces


def test_images_of_a_request_share_their_limits(processor):
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    url = "DATA:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * 2}]
    enough = 2 * max(IMAGE.size) ** 2
    for pixels, problem in (
        (enough, nullcontext()),
        (enough - 1, pytest.raises(ValueError, match="at most 1,799 pix")),
    ):
        limits = ServingLimits(pixels=pixels)
        reader = RequestReader.of(PluginOptions(allowed_image_hosts="none", limits=limits), processor)
        with problem:
            assert len(asyncio.run(reader.read(messages))[1]) == 2


def test_requests_are_read_with_the_limits_of_the_server(processor):
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    options = PluginOptions(allowed_image_hosts="none", limits=ServingLimits(image_side=40))
    reader = RequestReader.of(options, processor)
    part = {"type": "image_url", "image_url": {"url": url}, "boxes": BOXES}
    messages, images = asyncio.run(reader.read([{"role": "user", "content": [part, {"type": "text", "text": "a"}]}]))
    assert messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    assert images[0].boxes == BOXES and images[0].image.size == IMAGE.size
    assert RequestReader.of(PluginOptions(), processor) is None
    for change, error in (
        ({"image_url": {"url": "http://10.0.0.1/a.png"}}, "from which this server downloads"),
        ({"boxes": 3}, r"messages\[0\].content\[0\].boxes"),
        ({"other": 1}, "does not know it"),
    ):
        with pytest.raises(ValueError, match=error):
            asyncio.run(reader.read([{"role": "user", "content": [{**part, **change}]}]))


def test_models_with_other_answers_in_vllm_are_refused():
    check_config(mgllava.MGLlavaConfig(), FAMILIES["mgllava"])
    check_config(mgllava.SlimeConfig(), FAMILIES["slime"])
    for kind in ("llama", "mistral", "phi3", "qwen2", "qwen3"):  # those that docs/vllm.md names
        check_config(tiny_config(kind), FAMILIES["mgllava"])
    # Its images depend on the text, but it does not tell which placeholders to drop.
    with pytest.raises(ValueError, match="Use `mgllava serve` without `--engine vllm`"):
        check_config(mgllava.MGLlavaConfig(), replace(FAMILIES["mgllava"], images_depend_on_text=True))
    other = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="gemma2"))
    with pytest.raises(ValueError, match=r"must be one of llama, .* got 'gemma2'"):
        check_config(other, FAMILIES["mgllava"])


@pytest.mark.parametrize(
    ("values", "drops"),
    [({}, True), ({"router_top_p": 1.0}, False), ({"router_top_p": 1.0, "branch": "local"}, True)],
    ids=range(3),
)
def test_a_router_drops_tokens_unless_it_keeps_all(values, drops):
    assert drops_tokens(mgllava.SlimeConfig(**values), FAMILIES["slime"]) == drops
    assert not drops_tokens(mgllava.MGLlavaConfig(), FAMILIES["mgllava"])


@pytest.mark.parametrize("branch", ["both", "local", "global"])
def test_the_router_keeps_the_tokens_of_generate(tmp_path, branch):
    model, tiles = tiny_slime(branch=branch), [[2, 0], [2], [4], []]
    model.save_pretrained(tmp_path)
    inputs = slime_inputs(tiles)
    config = copy.deepcopy(model.config)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}  # of the layers, which are left out
    described = SimpleNamespace(hf_config=config, model=str(tmp_path), revision=None, dtype=torch.float32)
    with CaptureLogger(logging.get_logger("transformers")) as said:
        router = ImageRouter(described, device="cpu")
    assert "lm_head" not in said.out and "language_model" not in said.out and config.quantization_config
    assert not [name for name, _ in router.model.named_parameters() if "layers" in name and "language" in name]
    for index, counts in enumerate(tiles[:3]):
        prompt = one_slime_prompt(inputs, tiles, index)
        output = model.generate(**prompt, max_new_tokens=1, return_dict_in_generate=True)
        text_ids = [token for token in prompt["input_ids"][0].tolist() if token != model.config.image_token_id]
        views = prompt["pixel_values"].split([1 + count for count in counts])
        kept = [
            router({"pixel_values": view, "image_grids": grid[None]}, text_ids)
            for view, grid in zip(views, prompt["image_grids"], strict=True)
        ]
        expected = torch.cat(list(output.image_outputs.pooler_output))[output.kept_tokens]
        torch.testing.assert_close(torch.cat(kept), expected, atol=1e-4, rtol=1e-4)  # views in other batches
        assert branch == "global" or len(expected) < len(output.kept_tokens)


def test_weights_that_the_router_lacks_are_named(tmp_path):
    model = tiny_slime()
    weights = model.state_dict()
    del weights["model.local_compressor.queries"]
    model.save_pretrained(tmp_path, state_dict=weights)
    described = SimpleNamespace(hf_config=model.config, model=str(tmp_path), revision=None, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"these are missing: local_compressor\.queries\."):
        ImageRouter(described, device="cpu")


@pytest.mark.parametrize("kind", [BoxedImage, PluginOptions])
def test_records_that_threads_share_cannot_be_changed(kind):
    with pytest.raises(FrozenInstanceError):
        setattr(object.__new__(kind), fields(kind)[0].name, None)
