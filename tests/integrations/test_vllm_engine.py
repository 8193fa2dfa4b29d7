"""The plugin in a stand-in for vLLM: prompts, images and logits are those of the package."""

import asyncio
import base64
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from transformers import AutoTokenizer

from mgllava import MGLlavaImageProcessor, MGLlavaProcessor, SlimeImageProcessor, SlimeProcessor
from mgllava.processing import SLIME_CHAT_TEMPLATES
from tests.integrations import vllm_stand_in as vllm
from tests.tiny import IMAGE_SIZE, NUM_FUSED_TOKENS, NUM_LOCAL_TOKENS, tiny_model, tiny_slime

SMALL_MODEL = Path(__file__).parents[2] / "small_world" / "model"
TEXT, VOCABULARY = {"vocab_size": 512, "max_position_embeddings": 1024}, {"unpadded_vocab_size": 511}
IMAGE = PIL.Image.linear_gradient("L").resize((30, 20)).rotate(30).convert("RGB")
BOXES = [[1, 2, 11, 12], [3, 4, 9, 18]]
OTHER = IMAGE.resize((40, 50)).rotate(90)
WHAT = {"type": "text", "text": "What is it?"}


def ask(*images, text=WHAT):
    """Make a user turn of images, or of pairs of an image and its boxes."""
    blocks = [
        {"type": "image", "image": image[0], "boxes": image[1]}
        if isinstance(image, tuple)
        else {"type": "image", "image": image}
        for image in images
    ]
    return {"role": "user", "content": [*blocks, text]}


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def data_url(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Detector:
    """Finds one box, as large as the image, and notes the sizes of the images that it sees."""

    def __init__(self):
        self.seen = []

    def detect(self, images, **options):
        self.seen += [image.size for image in images]
        return [{"boxes": [[0, 0, image.width, image.height]], "labels": ["all"], "scores": [0.5]} for image in images]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMALL_MODEL)


@pytest.fixture(scope="module")
def weights(tokenizer):
    return tiny_model(text_config=TEXT, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **VOCABULARY)


@pytest.fixture
def processor(tokenizer):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = MGLlavaProcessor(
        MGLlavaImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer,
        image_seq_length=NUM_FUSED_TOKENS,
        chat_template=tokenizer.chat_template,
    )
    processor.box_detector = Detector()
    return processor


@pytest.fixture(autouse=True)
def stand_in_for_vllm(monkeypatch):
    vllm.install(monkeypatch)
    from mgllava.integrations.vllm import register

    register()


@pytest.fixture
def start(processor, weights):
    """Return a function that starts the engine with the plugin's options, and returns its renderer and its model."""

    def run(processor=processor, weights=weights, folder="folder", model_options=None, **options):
        hf_config = type(weights.config)(**weights.config.to_dict())
        hf_config.architectures = [type(weights).__name__]
        config = vllm.configured(folder, hf_config, processor, {"mgllava": options}, **(model_options or {}))
        return vllm.renderer_of(config), vllm.model_of(config, weights)

    return run


@pytest.fixture
def expect(processor, weights):
    """Return a function from a conversation to its ids and the logits of the next token."""

    def run(conversation, processor=processor, weights=weights, **options):
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        with torch.no_grad():
            logits = weights(**inputs).logits[0, -1:]
        logits[:, weights.config.unused_token_ids] = -torch.inf
        return inputs["input_ids"][0].tolist(), logits

    return run


def chat_params(**options):
    return vllm.ChatParams(chat_template_kwargs={"add_generation_prompt": True}, **options)


CONVERSATIONS = {
    "two boxes": [ask((IMAGE, BOXES))],
    "no boxes": [ask((IMAGE, []))],
    "found boxes": [ask(IMAGE)],
    "boxes with labels": [ask((IMAGE, {"boxes": BOXES, "labels": ["a", "b"], "scores": [0.5, 0.9]}))],
    "two images": [ask((IMAGE, BOXES), (OTHER, BOXES[:1]))],
    "the same image with other boxes": [ask((IMAGE, BOXES[:1]), (IMAGE, BOXES))],
    "turns": [ask((IMAGE, BOXES)), answer("a gradient"), ask(OTHER), answer("yes"), ask()],
    "system": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, ask((IMAGE, BOXES))],
    "text": [ask()],
}


def test_ids_and_logits_are_those_of_the_package(start, expect):
    renderer, served = start()
    expected = {name: expect(conversation) for name, conversation in CONVERSATIONS.items()}
    for _ in range(2):  # new and cached images
        found = renderer.render_chat(CONVERSATIONS.values(), chat_params())
        for inputs, (ids, logits) in zip(found, expected.values(), strict=True):
            assert inputs["prompt_token_ids"] == ids
            torch.testing.assert_close(served.run(inputs), logits, atol=1e-4, rtol=1e-4)
    (alone,) = renderer.render_chat([CONVERSATIONS["turns"]], chat_params())
    assert alone["prompt_token_ids"] == expected["turns"][0]


def test_boxes_come_in_every_form_of_python(start, processor):
    renderer, _ = start()
    text = processor.apply_chat_template([ask(IMAGE)], add_generation_prompt=True)
    (expected,) = renderer.render_chat([[ask((IMAGE, BOXES))]], chat_params())
    ids = expected["prompt_token_ids"]
    pair = {"image": IMAGE, "boxes": BOXES}
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": pair}},
        {"prompt": text, "multi_modal_data": {"image": [pair]}},
        {"prompt": text, "multi_modal_data": {"image": IMAGE}, "mm_processor_kwargs": {"boxes": [BOXES]}},
        {"prompt_token_ids": ids, "multi_modal_data": {"image": pair}},
    ]
    found = renderer.render_cmpl(prompts)
    plain = [{"role": "user", "content": [{"type": "image_pil", "image_pil": IMAGE}, WHAT]}]
    found += renderer.render_chat([plain], chat_params(mm_processor_kwargs={"boxes": [BOXES]}))
    for inputs in found:
        assert (inputs["prompt_token_ids"], inputs["mm_hashes"]) == (ids, expected["mm_hashes"])


def test_options_of_the_image_processor_reach_it(start, expect):
    found = {"boxes": [[1, 1, 20, 20], [2, 2, 21, 21]], "scores": [0.9, 0.8], "labels": ["a", "a"]}
    conversation = [ask((IMAGE, found))]
    one, both = expect(conversation)[0], expect(conversation, processor_kwargs={"iou_threshold": 0.99})[0]
    assert len(both) == len(one) + 1
    renderer, _ = start()
    for options in ({"iou_threshold": 0.99}, {"images_kwargs": {"iou_threshold": 0.99}}):
        for _ in range(2):
            (inputs,) = renderer.render_chat([conversation], chat_params())
            assert inputs["prompt_token_ids"] == one
            (inputs,) = renderer.render_chat([conversation], chat_params(mm_processor_kwargs=options))
            assert inputs["prompt_token_ids"] == both
    for name in ("bxes", "boxes_", "return_tensors"):
        with pytest.raises(ValueError, match=f"must be options of the image processor, got {name}"):
            renderer.render_chat([conversation], chat_params(mm_processor_kwargs={name: 1}))


def test_each_image_without_boxes_is_seen_by_the_detector_once(start, processor):
    renderer, _ = start()
    seen, same = processor.box_detector.seen, IMAGE.copy()
    conversations = [[ask(IMAGE)], [ask(OTHER, (IMAGE, BOXES))], [ask(same), answer("yes"), ask((OTHER, []))]]
    first = renderer.render_chat(conversations, chat_params())
    assert sorted(seen) == sorted([IMAGE.size, OTHER.size])
    boxes = [image["boxes"].data[0].tolist() for inputs in first for image in inputs["mm_kwargs"]["image"]]
    assert boxes[0] == boxes[3] != boxes[1] and len(boxes[2]) == 2 and boxes[4] == [[0, 0, 0, 0]]
    assert renderer.render_chat(conversations, chat_params()) == first and len(seen) == 2
    found = asyncio.run(renderer.render_chat_async([[ask(IMAGE)], [ask(OTHER)]], chat_params()))
    assert found[0]["mm_hashes"] == first[0]["mm_hashes"] and len(seen) == 2


def test_the_detector_can_be_left_out(start, expect, processor):
    renderer, _ = start(box_detector=False)
    (inputs,) = renderer.render_chat([[ask(IMAGE)]], chat_params())
    assert processor.box_detector.seen == []
    processor.box_detector = None
    assert inputs["prompt_token_ids"] == expect([ask(IMAGE)])[0]


def named(image, name, **fields):
    return {"role": "user", "content": [{"type": "image_pil", "image_pil": image, "uuid": name, **fields}, WHAT]}


def test_a_name_stands_for_an_image_with_its_boxes(start):
    renderer, _ = start()
    for boxes in (BOXES, BOXES[:1]):
        (expected,) = renderer.render_chat([[ask((IMAGE, boxes))]], chat_params())
        for image in (IMAGE, None):
            (inputs,) = renderer.render_chat([[named(image, "ten", boxes=boxes)]], chat_params())
            assert inputs["prompt_token_ids"] == expected["prompt_token_ids"]
    with pytest.raises(ValueError, match="image 0 must be given: it is no longer in the cache"):
        renderer.render_chat([[named(None, "ten", boxes=[])]], chat_params())
    prompt = {"prompt": "<image> a", "multi_modal_data": {"image": {"image": IMAGE, "boxes": BOXES}}}
    inputs = renderer.render_cmpl([{**prompt, "multi_modal_uuids": {"image": "ten"}}, prompt])
    assert [found["mm_hashes"]["image"][0].startswith("ten ") for found in inputs] == [True, False]


def test_a_name_stands_for_the_boxes_that_were_found(start, processor):
    renderer, _ = start()
    first, again = (renderer.render_chat([[named(image, "ten")]], chat_params())[0] for image in (IMAGE, None))
    assert first == again and first["mm_kwargs"]["image"][0]["num_boxes"].data.item() == 1
    assert processor.box_detector.seen == [IMAGE.size]
    with pytest.raises(ValueError, match="image 0 must be given"):
        renderer.render_chat([[named(None, None)]], chat_params())


@pytest.mark.parametrize("kind", ["transparent", "turned"])
def test_files_are_opened_by_the_processor(start, kind):
    exif, image = PIL.Image.Exif(), IMAGE.copy()
    if kind == "turned":
        exif[0x0112] = 6
    else:
        image.putalpha(100)
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    part = {"type": "image_url", "image_url": {"url": data_url(image, exif=exif)}}
    renderer, _ = start()
    (inputs,) = renderer.render_chat([[{"role": "user", "content": [part, WHAT]}]], chat_params())
    expected = renderer._processor.image_processor(images=[PIL.Image.open(file)], return_tensors="pt")
    (features,) = inputs["mm_kwargs"]["image"]
    torch.testing.assert_close(features["pixel_values"].data, expected["pixel_values"], rtol=0, atol=0)


def parts_of(*images, text="What is it?"):
    return [
        *({"type": "image_url", "image_url": {"url": data_url(image)}} for image in images),
        {**WHAT, "text": text},
    ]


@pytest.mark.parametrize("hosts", ["none", None], ids=["read by the plugin", "read by vLLM"])
def test_requests_are_brought_into_the_form_of_training(start, expect, hosts):
    renderer, _ = start(allowed_image_hosts=hosts, box_detector=False)
    asked = {
        "boxes": (
            [{"role": "user", "content": [{**parts_of(IMAGE)[0], "boxes": BOXES}, WHAT]}],
            [ask((IMAGE, BOXES))],
        ),
        "control tokens": (
            [{"role": "user", "content": "Is <image> or </s> a word?"}],
            [ask(text={**WHAT, "text": "Is < image> or < /s> a word?"})],
        ),
        "order": (
            [ask(), ask(), {"role": "developer", "content": "Be brief."}],
            [
                {"role": "system", "content": [{**WHAT, "text": "Be brief."}]},
                ask(text={**WHAT, "text": "What is it?\nWhat is it?"}),
            ],
        ),
        "empty": ([ask(), {"role": "assistant", "content": ""}, ask()], [ask(), answer(""), ask()]),
    }
    for name, (messages, expected) in asked.items():
        (inputs,) = asyncio.run(renderer.render_chat_async([messages], chat_params()))
        assert inputs["prompt_token_ids"] == expect(expected)[0], name
        assert len(inputs["mm_kwargs"]["image"]) == (name == "boxes")


def test_an_answer_may_be_continued(start, processor):
    renderer, _ = start()
    messages = [ask(), answer("It is a")]
    params = vllm.ChatParams(chat_template_kwargs={"continue_final_message": True, "add_generation_prompt": False})
    (inputs,) = asyncio.run(renderer.render_chat_async([messages], params))
    assert inputs["prompt_token_ids"] == processor.encode_text(messages, continue_final_message=True)[0]


def test_another_chat_template_and_its_variables_are_used(start, processor):
    template = "{% for message in messages %}{{ message.content[-1].text }}{% endfor %}{{ end }}"
    params = vllm.ChatParams(chat_template=template, chat_template_kwargs={"end": "Z", "tokenize": True, "no": None})
    (inputs,) = start()[0].render_chat([[ask()]], params)
    assert inputs["prompt_token_ids"] == processor.encode_text("What is it?Z")[0]


def test_prompts_are_encoded_in_the_chunks_of_the_processor(start, processor):
    renderer, _ = start()
    texts = ("Hello world", "USER: What? ASSISTANT: yes</s>\n<s>USER: Sure? ASSISTANT:", "a")
    for special in (True, False):
        found = renderer.render_cmpl([{"prompt": text} for text in texts], SimpleNamespace(add_special_tokens=special))
        expected = processor(text=list(texts), add_special_tokens=special)["input_ids"]
        assert [inputs["prompt_token_ids"] for inputs in found] == expected


@pytest.mark.parametrize(
    ("conversation", "parameter", "error"),
    [
        ([ask(text={**WHAT, "boxes": BOXES})], "messages", "must be next to an image"),
        ([{"role": "user", "content": [{"type": "image", "boxes": BOXES}]}], "messages", "must have one of image"),
        ([ask((IMAGE, [1, 2, 3, 4]))], "messages", "Wrap it"),
        ([ask(text={"type": "video_url"})], "type", "Unsupported"),
    ],
    ids=range(4),
)
def test_wrong_messages_are_errors_of_the_request(start, conversation, parameter, error):
    renderer, _ = start()
    with pytest.raises(vllm.VLLMValidationError, match=error) as raised:
        renderer.render_chat([conversation], chat_params())
    assert raised.value.parameter == parameter
    with pytest.raises(vllm.VLLMValidationError, match=error):
        asyncio.run(renderer.render_chat_async([conversation], chat_params()))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "3 cats", "tool_call_id": "1"},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ],
    ids=["tool", "assistant"],
)
def test_tools_are_refused_as_errors_of_the_request(start, message):
    error = "Turns must alternate" if message["role"] == "tool" else "message 2 has `tool_calls`"
    with pytest.raises(vllm.VLLMValidationError, match=error):
        asyncio.run(start()[0].render_chat_async([[ask(), message, ask()]], chat_params()))


def test_wrong_templates_and_requests_are_errors_of_the_request(start):
    renderer, _ = start(allowed_image_hosts="none")
    with pytest.raises(vllm.VLLMValidationError, match="no such turn"):
        renderer.render_chat([[ask()]], vllm.ChatParams(chat_template="{{ raise_exception('no such turn') }}"))
    for change, error in (({"boxes": 3}, r"messages\[0\].content\[0\].boxes"), ({"type": "audio"}, "must be one of")):
        messages = [{"role": "user", "content": [{**parts_of(IMAGE)[0], **change}]}]
        with pytest.raises(vllm.VLLMValidationError, match=error):
            asyncio.run(renderer.render_chat_async([messages], chat_params()))


def test_wrong_prompts_are_refused(start):
    renderer, _ = start()
    with pytest.raises(vllm.VLLMValidationError, match="placeholder of an image, but no image") as raised:
        renderer.render_cmpl([{"prompt": "USER: <image>\nWhat? ASSISTANT:"}])
    assert raised.value.parameter == "prompt"
    with pytest.raises(vllm.VLLMValidationError, match="one entry per image"):
        prompt = {"prompt": "<image>", "multi_modal_data": {"image": IMAGE}}
        renderer.render_cmpl([{**prompt, "mm_processor_kwargs": {"boxes": [BOXES, BOXES]}}])
    with pytest.raises(ValueError, match="2 placeholders for 1 images"):
        renderer.render_cmpl([{"prompt": "<image><image>", "multi_modal_data": {"image": IMAGE}}])
    with pytest.raises(ValueError, match="must lie in the upright image"):
        renderer.render_chat([[ask((IMAGE, [[500, 500, 600, 600]]))]], chat_params())


def test_a_broken_image_fails_its_own_request(start, processor):
    renderer, _ = start()

    def detect(images, **options):
        raise OSError("truncated")

    processor.box_detector.detect = detect
    with pytest.raises(OSError, match="truncated"):
        renderer.render_chat([[ask(IMAGE)]], chat_params())
    with pytest.raises(OSError, match="truncated"):
        asyncio.run(renderer.render_chat_async([[ask(IMAGE)]], chat_params()))


def test_memory_is_reserved_for_the_largest_image(start, processor):
    renderer, served = start(max_boxes=7)
    found = renderer.get_mm_processor()
    most = found.info.get_mm_max_tokens_per_item(100, {"image": 2})
    assert most == {"image": NUM_FUSED_TOKENS + 7} and found.info.get_supported_mm_limits() == {"image": None}
    inputs = found.get_dummy_mm_inputs({"image": 2})
    assert inputs["prompt_token_ids"].count(processor.image_token_id) == 2 * most["image"]
    assert served.run(inputs).shape == (1, 512)
    assert found.get_dummy_mm_inputs({"image": 1})["mm_placeholders"]["image"][0][1] == most["image"]
    assert found.dummy_inputs.get_dummy_text({}) == "" and found.dummy_inputs.get_dummy_mm_data(1, {}, {}) == {
        "image": []
    }


def test_boxes_beyond_the_limit_are_refused(start):
    renderer, _ = start(max_boxes=2)
    boxes = [[index, 0, index + 1, 20] for index in range(3)]
    assert renderer.render_chat([[ask((IMAGE, boxes[:2]))]], chat_params())
    with pytest.raises(ValueError, match="`boxes` of image 1 must be at most 2, got more"):
        renderer.render_chat([[ask((OTHER, boxes[:1]), (IMAGE, boxes))]], chat_params())


@pytest.mark.parametrize(("length", "expected"), [(NUM_FUSED_TOKENS + 6, 4), (NUM_FUSED_TOKENS, 1), (900, 300)])
def test_boxes_fit_into_the_context(start, length, expected):
    renderer, _ = start(model_options={"max_model_len": length})
    info = renderer.get_mm_processor().info
    assert info.most_boxes == expected and info.largest_image[1] == NUM_FUSED_TOKENS + expected


@pytest.fixture(scope="module")
def slime(tokenizer, tmp_path_factory):
    """Return the processor and model of SliME with a router, and the folder with its weights."""
    processor = SlimeProcessor(
        SlimeImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}),
        tokenizer,
        num_global_tokens=NUM_FUSED_TOKENS,
        num_local_tokens=NUM_LOCAL_TOKENS,
        chat_template=SLIME_CHAT_TEMPLATES["v1"],
    )
    model = tiny_slime(text_config=TEXT, image_token_id=processor.image_token_id, **VOCABULARY)
    folder = tmp_path_factory.mktemp("slime")
    model.save_pretrained(folder)
    return processor, model, folder


@pytest.mark.parametrize("is_routed", [True, False])
def test_slime_gets_the_tokens_of_generate(start, slime, is_routed, monkeypatch):
    processor, model, folder = slime
    monkeypatch.setattr(model.config, "router_top_p", 0.6 if is_routed else 1.0)
    monkeypatch.setattr(model.model.config, "router_top_p", 0.6 if is_routed else 1.0)
    renderer, served = start(processor, model, folder, router_device="cpu")
    wide = IMAGE.resize((300, 60))
    conversations = [
        [ask(IMAGE)],
        [ask(wide)],
        [ask(wide, text={**WHAT, "text": "How many circles are left of the red rectangle?"})],
        [ask(wide, IMAGE)],
        [ask()],
    ]
    counts = []
    for _ in range(2):
        for conversation, inputs in zip(
            conversations, renderer.render_chat(conversations, chat_params()), strict=True
        ):
            batch = processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            output = model.generate(
                **batch, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            prompt = batch["input_ids"][0].tolist()
            counts.append(prompt.count(processor.image_token_id))
            if (kept := getattr(output, "kept_tokens", None)) is not None:
                kept = iter(kept.tolist())
                prompt = [token for token in prompt if token != processor.image_token_id or next(kept)]
            counts[-1] -= prompt.count(processor.image_token_id)
            assert inputs["prompt_token_ids"] == prompt
            logits = output.logits[0].clone()
            logits[:, model.config.unused_token_ids] = -torch.inf
            torch.testing.assert_close(served.run(inputs), logits, atol=1e-3, rtol=1e-3)
    assert any(counts) == is_routed
    info = renderer.get_mm_processor()
    sizes = [(42 * rows, 42 * columns) for rows in range(1, 9) for columns in range(1, 9)]
    images = [PIL.Image.new("RGB", size) for size in sizes]
    features = processor.image_processor(images=images, return_tensors="pt")
    assert max(processor.num_image_tokens(features)) == info.info.largest_image[1]
    dummy = info.get_dummy_mm_inputs({"image": 1})
    assert dummy["mm_placeholders"]["image"][0][1] == info.info.largest_image[1]
    assert served.run(dummy).shape == (1, 512)
    text = processor.apply_chat_template([ask(wide)], add_generation_prompt=True)
    whole = processor(images=[wide], text=text)["input_ids"][0]
    prompt = {"prompt_token_ids": whole, "multi_modal_data": {"image": wide}}
    if is_routed:
        with pytest.raises(vllm.VLLMValidationError, match="must have one placeholder") as raised:
            renderer.render_cmpl([prompt])
        assert raised.value.parameter == "prompt"
    else:
        assert renderer.render_cmpl([prompt])[0]["prompt_token_ids"] == whole
    with pytest.raises(vllm.VLLMValidationError, match="takes no boxes"):
        renderer.render_chat([[ask((IMAGE, BOXES))]], chat_params())
    with pytest.raises(ValueError, match="`boxes` of image 0 must be left out: this model takes no boxes"):
        renderer.render_cmpl([{"prompt": "<image>", "multi_modal_data": {"image": {"image": IMAGE, "boxes": BOXES}}}])


def test_images_are_not_routed_without_their_text(start, slime):
    processor, model, folder = slime
    renderer, _ = start(processor, model, folder)
    found = renderer.get_mm_processor()
    with pytest.raises(RuntimeError, match="without the text"):
        found.apply(
            vllm.ProcessorInputs([processor.image_token_id], found.info.data_parser.parse_mm_data({"image": IMAGE}))
        )


def test_every_family_that_reads_text_is_registered_once(monkeypatch):
    from mgllava.integrations.vllm import registration

    names = {"MGLlavaForConditionalGeneration", "SlimeForConditionalGeneration"}
    assert set(vllm.ModelRegistry.models) == set(vllm.MODELS_CONFIG_MAP) == names
    assert vllm.TokenizerRegistry == {"mgllava": ("vllm.tokenizers.hf", "CachedHfTokenizer")}
    registration.register_all()  # as vLLM does in each process


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokenizer_mode": "mistral"}, "`tokenizer_mode` must be 'auto' .* got 'mistral'"),
        ({"enable_prompt_embeds": True}, "`enable_prompt_embeds` must be left out"),
        ({"multimodal_config": SimpleNamespace(enable_mm_embeds=True)}, "`enable_mm_embeds` must be left out"),
    ],
    ids=range(3),
)
def test_options_of_vllm_that_cannot_be_right_are_refused(start, options, error):
    with pytest.raises(ValueError, match=error):
        start(model_options=options)
    start(model_options={"enable_prompt_embeds": False})
    for mode in ("auto", "hf", "mgllava"):
        start(model_options={"tokenizer_mode": mode})


def test_releases_without_a_method_that_is_overridden_are_refused(start, monkeypatch):
    from mgllava.integrations.vllm.hooks import OVERRIDDEN, missing_hooks

    assert missing_hooks(OVERRIDDEN) == []
    assert missing_hooks({vllm.HfRenderer: {"render_messages": ("messages", "other"), "gone": ()}}) == [
        "HfRenderer.render_messages(other)",
        "HfRenderer.gone()",
    ]
    monkeypatch.delattr(vllm.MultiModalDataParser, "_parse_image_data")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.32\.0, which no longer has MultiModalDataParser\._parse_image"):
        start()


def test_a_release_without_a_name_still_runs_other_models(monkeypatch, caplog):
    from mgllava.integrations.vllm import register

    vllm.install(monkeypatch)
    monkeypatch.delattr(sys.modules["vllm.renderers.hf"], "HfRenderer")
    register()
    assert "cannot be used with this release of vLLM: cannot import name 'HfRenderer'" in caplog.text
    assert not vllm.MODELS_CONFIG_MAP
