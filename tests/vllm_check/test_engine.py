"""vLLM gives the ids of the processor and the answers of `generate`."""

import asyncio
import base64
import io
import os

import PIL.Image
import pytest

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError as VLLMError
from vllm.renderers import ChatParams

from .conftest import MODEL, answer, ask, boxes_of, conversations, picture

pytestmark = pytest.mark.slow
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm():
    is_compiled = os.environ.get("MGLLAVA_VLLM_COMPILED") == "1"
    options = {"mgllava": {"box_detector_device": "cpu", "max_boxes": 40}}
    return LLM(str(MODEL), dtype="float32", enforce_eager=not is_compiled, max_num_seqs=32, additional_config=options)


def result(output):
    tokens = list(output.outputs[0].token_ids)
    return output.prompt_token_ids, tokens[:-1] if tokens and tokens[-1] == 2 else tokens


def test_ids_and_answers_of_twenty_conversations(llm, generate):
    asked = conversations()
    assert len(asked) == 20
    expected = [generate(conversation) for conversation in asked]
    for _ in range(2):  # new and cached images; all at once, and mixed with others
        outputs = llm.chat(asked, GREEDY, use_tqdm=False)
        for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
            assert result(output) == wanted, index
    for index in (3, 8, 12):
        assert result(llm.chat(asked[index], GREEDY, use_tqdm=False)[0]) == expected[index], index


def test_boxes_in_every_python_form(llm, generate, processor):
    image, boxes = picture(6), boxes_of(6, 3)
    conversation = [ask("What is in the picture?", (image, boxes))]
    expected = generate(conversation)
    text = processor.apply_chat_template([ask("What is in the picture?", (image, None))], add_generation_prompt=True)
    forms = [
        {"prompt": text, "multi_modal_data": {"image": {"image": image, "boxes": boxes}}},
        {"prompt": text, "multi_modal_data": {"image": [{"image": image, "boxes": boxes}]}},
        {"prompt": text, "multi_modal_data": {"image": image}, "mm_processor_kwargs": {"boxes": [boxes]}},
        {"prompt_token_ids": expected[0], "multi_modal_data": {"image": {"image": image, "boxes": boxes}}},
    ]
    for index, output in enumerate(llm.generate(forms, GREEDY, use_tqdm=False)):
        assert result(output) == expected, index
    plain = [{"role": "user", "content": [{"type": "image_pil", "image_pil": image}, conversation[0]["content"][-1]]}]
    output = llm.chat(plain, GREEDY, mm_processor_kwargs={"boxes": [boxes]}, use_tqdm=False)[0]
    assert result(output) == expected


def test_the_example_of_the_page_runs(llm, capsys):
    page = (MODEL.parents[1] / "docs" / "vllm.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    file = io.BytesIO()
    picture(13, (500, 500)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for old, new in (('llm = LLM("mg-llava-vicuna7b")', ""), ("https://example.com/table.jpg", url)):
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "docs/vllm.md", "exec"), {"llm": llm})
    assert capsys.readouterr().out.strip()


def test_options_of_the_image_processor(llm, generate):
    found = {"boxes": [[10, 10, 60, 60], [11, 11, 61, 61]], "scores": [0.9, 0.8], "labels": ["a", "a"]}
    conversation = [ask("What is in the picture?", (picture(7), found))]
    kept_one, kept_both = generate(conversation), generate(conversation, processor_kwargs={"iou_threshold": 0.99})
    assert len(kept_both[0]) == len(kept_one[0]) + 1
    for _ in range(2):
        assert result(llm.chat(conversation, GREEDY, use_tqdm=False)[0]) == kept_one
        output = llm.chat(conversation, GREEDY, mm_processor_kwargs={"iou_threshold": 0.99}, use_tqdm=False)[0]
        assert result(output) == kept_both


def test_images_without_boxes_get_those_of_the_detector(llm, generate, processor, monkeypatch):
    renderer = llm.llm_engine.renderer
    image = picture(8)
    conversation = [ask("What is in the picture?", (image, None))]
    expected = generate(conversation)
    boxes = processor.detect([image])
    assert generate([ask("What is in the picture?", (image, boxes[0]))]) == expected
    calls, detect = [], renderer._processor.detect
    monkeypatch.setattr(renderer._processor, "detect", lambda images: calls.append(len(images)) or detect(images))
    both = [ask("Compare.", (image, None), (picture(9), None))]
    wanted = [expected, generate(both), expected]
    outputs = llm.chat([conversation, both, conversation], GREEDY, use_tqdm=False)
    assert [result(output) for output in outputs] == wanted
    assert sum(calls) == 2, "each image once"
    assert result(llm.chat(conversation, GREEDY, use_tqdm=False)[0]) == expected and sum(calls) == 2

    monkeypatch.setattr(renderer, "_finder", None)
    without = generate(conversation, with_detector=False)
    assert result(llm.chat(conversation, GREEDY, use_tqdm=False)[0]) == without != expected


def test_names_of_images_stand_for_the_image_with_its_boxes(llm, generate):
    image, text = picture(10), "What is in the picture?"
    for boxes in (boxes_of(10, 1), boxes_of(10, 2)):
        expected = generate([ask(text, (image, boxes))])
        blocks = [
            {"type": "image_pil", "image_pil": image, "boxes": boxes, "uuid": "ten"},
            {"type": "text", "text": text},
        ]
        for _ in range(2):
            output = llm.chat([{"role": "user", "content": blocks}], GREEDY, use_tqdm=False)[0]
            assert result(output) == expected


def test_transparent_and_turned_images_are_opened_by_the_processor(llm, generate, tmp_path):
    clear = picture(11).convert("RGBA")
    clear.putalpha(128)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture(12).save(tmp_path / "turned.png", exif=exif)
    turned = PIL.Image.open(tmp_path / "turned.png")
    for image in (clear, turned):
        boxes = boxes_of(11, 2, (120, 120))
        assert result(llm.chat([ask("What?", (image, boxes))], GREEDY, use_tqdm=False)[0]) == generate(
            [ask("What?", (image, boxes))]
        )


@pytest.mark.parametrize(
    ("conversation", "error"),
    [
        ([ask("What?", (picture(1), [[10, 10, 400, 400]])), answer("x")], "."),
        ([ask("What?", (picture(1), [[500, 500, 600, 600]]))], "must lie in the upright image"),
        ([ask("What?", (picture(1), [[0.1, 0.1, 0.5, 0.5]]))], "looks relative"),
        ([ask("What?", (picture(1), boxes_of(1, 41)))], "must be at most 40"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a", "boxes": [[1, 2, 3, 4]]}]}],
            "must be next to an image",
        ),
        ([{"role": "user", "content": [{"type": "image", "boxes": [[1, 2, 3, 4]]}]}], "must have one of image"),
    ],
    ids=range(6),
)
def test_wrong_requests_are_refused(llm, conversation, error):
    if conversation[-1]["role"] == "assistant":
        conversation = conversation[:-1]
        assert llm.chat(conversation, GREEDY, use_tqdm=False)  # clipped to the image, with a warning
        return
    with pytest.raises((ValueError, VLLMError), match=error):
        llm.chat(conversation, GREEDY, use_tqdm=False)


def test_wrong_prompts_are_refused(llm, processor):
    image = picture(1)
    with pytest.raises(VLLMError, match="placeholder of an image, but no image"):
        llm.generate("USER: <image>\nWhat? ASSISTANT:", GREEDY, use_tqdm=False)
    prompt = {"prompt": "USER: <image>\n<image>\nWhat? ASSISTANT:", "multi_modal_data": {"image": image}}
    with pytest.raises(ValueError, match="2 placeholders for 1 images"):
        llm.generate(prompt, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="must be options of the image processor, got bxes"):
        llm.chat([ask("What?", (image, []))], GREEDY, mm_processor_kwargs={"bxes": []}, use_tqdm=False)


def test_the_placeholder_is_never_generated(llm, processor):
    likes_it = SamplingParams(
        temperature=1.0, seed=0, max_tokens=40, ignore_eos=True, logit_bias={processor.image_token_id: 100.0}
    )
    prompt = [ask("What is in the picture?", (picture(1), boxes_of(1, 2)))]
    ids = llm.chat(prompt, likes_it, use_tqdm=False)[0].outputs[0].token_ids
    assert len(ids) == 40 and processor.image_token_id not in ids


def test_texts_are_encoded_as_the_processor_does(llm, processor):
    for text in ("Hello world", "USER: What? ASSISTANT: yes</s>\n<s>USER: Sure? ASSISTANT:", "a"):
        output = llm.generate(text, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)[0]
        assert output.prompt_token_ids == processor(text=text)["input_ids"][0]


def test_requests_that_vllm_reads_itself(llm, generate, processor):
    """As with `vllm serve`: boxes next to images, and control tokens in messages are text."""
    file = io.BytesIO()
    picture(14).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    boxes = boxes_of(14, 3)
    part = {"type": "image_url", "image_url": {"url": url}, "boxes": boxes}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Is </s> a word?"}]}]
    params = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
    _, (prompt,) = asyncio.run(llm.llm_engine.renderer.render_chat_async([messages], params))
    assert prompt["prompt_token_ids"] == generate([ask("Is < /s> a word?", (picture(14), boxes))])[0]


def test_hooks_that_are_gone_are_named():
    from mgllava.integrations.vllm.hooks import OVERRIDDEN, HfRenderer, check_hooks, missing_hooks

    check_hooks()
    assert missing_hooks(OVERRIDDEN) == []
    assert missing_hooks({HfRenderer: {"render_messages": ("messages", "other"), "gone": ()}}) == [
        "HfRenderer.render_messages(other)",
        "HfRenderer.gone()",
    ]
