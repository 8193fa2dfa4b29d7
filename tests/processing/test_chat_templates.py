"""Chat templates against the original's strings, ids and loss masks."""

import itertools
import json
from pathlib import Path

import jinja2
import jinja2.ext
import PIL.Image
import pytest
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from mgllava.processing import CHAT_TEMPLATES

from .conftest import tokenized

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())
TRAIN = json.loads((GOLDEN / "train_text.json").read_text())["cases"]
QUESTIONS, ANSWERS, SYSTEM = PROMPTS["questions"], PROMPTS["answers"], PROMPTS["system"]
FAMILIES = {"vicuna": "vicuna", "llama3": "llama3_chat", "phi3": "phi3_chat", "yi": "qwen_chat"}
CASES = [f"{turns}_{system}" for turns in ("one_turn", "two_turns") for system in ("no_system", "with_system")]
IMAGE = PIL.Image.new("RGB", (30, 20), "teal")


def conversation_of(case, image=None, to_answer=True):
    """Return the conversation of a case; image blocks come after the text, and the template moves them."""
    messages = [{"role": "system", "content": SYSTEM}] if "with_system" in case else []
    for turn in range(2 if "two_turns" in case else 1):
        content = [{"type": "text", "text": QUESTIONS[turn]}]
        if turn == 0:
            content.append({"type": "image"} if image is None else {"type": "image", "image": image})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": ANSWERS[turn]})
    return messages if to_answer else messages[:-1]


def collapse(ids, image_token_id):
    """Undo the expansion: one -200 per run of placeholders, as the original writes an image."""
    output = []
    for token in ids:
        if token != image_token_id:
            output.append(token)
        elif not output or output[-1] != -200:
            output.append(-200)
    return output


def original_ids_and_labels(template, case, raw, bos_id, eos_id):
    """Encode as the original does for training: each piece with the bare tokenizer, without transformers."""
    ids, labels = [], []

    def add(new, learned):
        ids.extend(new)
        labels.extend(new if learned else [-100] * len(new))

    def encode(text):
        return raw.encode(text, add_special_tokens=False).ids if text else []

    needs_bos = True
    for turn in PROMPTS["templates"][template]["train"][case]["turns"]:
        if needs_bos:
            add([bos_id], False)
        before, *after = turn["input"].split("<image>")
        add(encode(before), False)
        for chunk in after:
            add([-200], False)
            add(encode(chunk), False)
        add(encode(turn["output"]), True)
        if turn["need_eos_token"]:
            add([eos_id], True)
        add(encode(turn["sep"]), False)
        needs_bos = turn["need_eos_token"]
    return ids, labels


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_strings_equal_the_original(sentencepiece_like, family, case):
    golden = PROMPTS["templates"][FAMILIES[family]]

    def render(messages, **kwargs):
        return sentencepiece_like.apply_chat_template(messages, family, **kwargs)

    trained = golden["train"][case]["concatenated"].format(BOS="<s>", EOS="</s>")
    assert render(conversation_of(case)) == trained
    prompt = render(conversation_of(case, to_answer=False), add_generation_prompt=True)
    if "one_turn" in case:
        # the original puts the BOS id in front by hand
        assert prompt == "<s>" + golden["chat"][case]
    last = golden["train"][case]["turns"][-1]["output"]
    assert trained.startswith(prompt + last)


@pytest.mark.parametrize("tokens", [("<s>", "</s>"), ("<|im_start|>", "<|im_end|>"), (None, "<|endoftext|>")])
@pytest.mark.parametrize("with_system", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_is_a_prefix_of_the_longer_conversation(family, with_system, tokens):
    """TRL takes the common prefix of prompt and conversation as the prompt; engines reuse it from their caches."""
    bos, eos = tokens
    messages = [{"role": "system", "content": SYSTEM}] if with_system else []
    renderings = []
    for turn in range(3):
        messages.append({"role": "user", "content": [{"type": "text", "text": f"Q{turn}"}, {"type": "image"}]})
        renderings.append(render_alone(messages, family, bos, eos, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": f"A{turn}"})
        renderings.append(render_alone(messages, family, bos, eos))
    for shorter, longer in itertools.pairwise(renderings):
        assert longer.startswith(shorter)
    golden_start = PROMPTS["templates"][FAMILIES[family]]["chat"]["one_turn_no_system"].split("<image>")[0]
    start = renderings[0].removeprefix(bos or "")
    assert renderings[0] == (bos or "") + start
    assert golden_start in start and start.startswith(golden_start) != with_system
    repeats_bos = family == "vicuna" and bos == "<s>"
    assert renderings[-1].count("<s>") == (3 if repeats_bos else bos == "<s>")


def render_alone(messages, family, bos, eos, **options):
    """Render as a tokenizer does, without the processor."""
    special = {name: value for name, value in (("bos_token", bos), ("eos_token", eos)) if value}
    texts, _ = render_jinja_template([messages], chat_template=CHAT_TEMPLATES[family], **special, **options)
    return texts[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_see_that_content_may_be_blocks(family):
    """They look for a loop over the content itself in the syntax tree of the template."""
    loops = list(
        jinja2.Environment(extensions=[GenerationTag]).parse(CHAT_TEMPLATES[family]).find_all(jinja2.nodes.For)
    )
    items = [loop.iter for loop in loops if isinstance(loop.iter, jinja2.nodes.Getitem)]
    assert [(item.node.name, item.arg.value) for item in items] == [("message", "content")]
    messages = [{"role": "user", "content": "a <image>b"}, {"role": "assistant", "content": "c"}]
    blocks = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a b"}, {"type": "image_url", "image_url": {"url": "x"}}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
    ]
    assert render_alone(messages, family, "<s>", "</s>") == render_alone(blocks, family, "<s>", "</s>")


class GenerationTag(jinja2.ext.Extension):
    """Reads `{% generation %}`, which is transformers' own."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


@pytest.mark.parametrize(
    ("message", "options", "error"),
    [
        ({"role": "user"}, {}, "`content` must be a string or a list of blocks, message 2 has none"),
        ({"role": "user", "content": None}, {}, "message 2 has none"),
        ({"role": "user", "content": ["x"]}, {}, "must be 'text' or 'image' or 'video', got ''"),
        ({"role": "user", "content": [{"type": "audio"}]}, {}, "must be 'text' or 'image' or 'video', got 'audio'"),
        ({"role": "user", "content": 3}, {}, "message 2 has something else"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, {}, "message 2 has something else"),
        ({"role": "user", "content": [{"type": "text"}]}, {}, "`text` of a content block must be a string"),
        ({"role": "user", "content": "x"}, {"tools": [{"type": "function"}]}, "not trained with tools"),
        ({"role": "user", "content": "x"}, {"documents": [{"text": "y"}]}, "not trained with tools or documents"),
        ({"role": "user", "content": "x", "tool_calls": [{"type": "function"}]}, {}, "message 2 has `tool_calls`"),
        ({"role": "assistant", "content": [{"type": "image"}]}, {}, "Images must be in user turns.*assistant"),
        ({"role": "assistant", "content": [{"type": "video"}]}, {}, "Videos must be in user turns.*assistant"),
    ],
)
def test_templates_drop_nothing_silently(message, options, error):
    messages = [{"role": "system", "content": "s"}, message]
    with pytest.raises(jinja2.TemplateError, match=error):
        render_alone(messages, "vicuna", "<s>", "</s>", **options)
    with pytest.raises(jinja2.TemplateError, match="must have a user turn"):
        render_alone(messages[:1], "vicuna", "<s>", "</s>")


def test_arguments_that_would_be_ignored_are_refused(sentencepiece_like):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match=r"`chat_template` must be .*\(llama3, phi3, vicuna, yi\), got 'vicunna'"):
        sentencepiece_like.apply_chat_template(messages, "vicunna")
    with pytest.raises(ValueError, match="needs `return_dict=True`"):
        sentencepiece_like.apply_chat_template(messages, "yi", tokenize=True, return_assistant_tokens_mask=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_move_to_the_front_of_their_turn(sentencepiece_like, family):
    def render(content):
        return sentencepiece_like.apply_chat_template([{"role": "user", "content": content}], family)

    text, image = {"type": "text", "text": " What? "}, {"type": "image"}
    expected = render("<image>\nWhat?")
    assert "<image>\nWhat?" in expected
    for content in (
        [image, text],
        [text, image],
        "What? <image>",
        "<image> What?",
        [{"type": "text", "text": "What?<image>"}],
    ):
        assert render(content) == expected
    assert "<image>\n<image>\nWhat?" in render([image, text, image])
    assert " What? " in render(" What? ")
    assert render([image]) == render("<image>") == expected.replace("<image>\nWhat?", "<image>")


@pytest.mark.parametrize("family", FAMILIES)
def test_without_generation_prompt_the_turn_stays_open(sentencepiece_like, family):
    messages = [{"role": "user", "content": "Hi"}]
    short = sentencepiece_like.apply_chat_template(messages, family)
    long = sentencepiece_like.apply_chat_template(messages, family, add_generation_prompt=True)
    assert long.startswith(short) and "assistant" in long[len(short) :].lower()


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "system"], ["user", "assistant", "tool"]])
def test_turns_must_alternate(sentencepiece_like, roles):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(Exception, match=f"must alternate.*got {roles[-1]} as message {len(roles)}"):
        sentencepiece_like.apply_chat_template(messages, "yi")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("processor", ["sentencepiece_like", "byte_level"])
def test_training_ids_and_mask_equal_the_original_encoder(request, processor, family, case):
    processor = request.getfixturevalue(processor)
    tokenizer = processor.tokenizer
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    expected, labels = original_ids_and_labels(FAMILIES[family], case, tokenizer.backend_tokenizer, bos_id, eos_id)
    ids, mask = tokenized(processor, conversation_of(case, IMAGE), family)
    assert len(ids) == len(mask) and ids.count(processor.image_token_id) == 5
    assert collapse(ids, processor.image_token_id) == expected
    assert list(itertools.compress(ids, mask)) == [label for label in labels if label != -100]


def test_the_original_encoder_of_this_file_agrees_with_the_golden_ids(sentencepiece_like):
    raw = sentencepiece_like.tokenizer.backend_tokenizer
    for name, golden in TRAIN.items():
        assert original_ids_and_labels(*name.split("."), raw, 1, 2) == (golden["input_ids"], golden["labels"])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_masks_of_a_padded_batch_equal_those_of_its_rows(byte_level, padding_side):
    batch = [conversation_of("one_turn_no_system", IMAGE), conversation_of("two_turns_with_system", IMAGE)]
    features = byte_level.apply_chat_template(
        batch,
        "llama3",
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    for index, conversation in enumerate(batch):
        ids, mask = tokenized(byte_level, conversation, "llama3")
        real = features["attention_mask"][index].bool()
        assert features["input_ids"][index][real].tolist() == ids
        assert features["assistant_masks"][index][real].tolist() == mask
        assert features["assistant_masks"][index][~real].sum() == 0
    assert (features["attention_mask"][0, 0] == 0) == (padding_side == "left")


def test_continue_final_message_leaves_the_answer_open(sentencepiece_like):
    messages = conversation_of("one_turn_no_system", IMAGE)
    text = sentencepiece_like.apply_chat_template(messages, "phi3", continue_final_message=True)
    assert text.endswith("<|assistant|>\nA red circle.")
    ids = sentencepiece_like.apply_chat_template(messages, "phi3", continue_final_message=True, tokenize=True)[0]
    closed = TRAIN["phi3_chat.one_turn_no_system"]["input_ids"]
    answer = sentencepiece_like.tokenizer.encode("A red circle.", add_special_tokens=False)
    collapsed = collapse(ids, sentencepiece_like.image_token_id)
    assert collapsed == closed[: len(collapsed)] and collapsed[-len(answer) :] == answer


def test_users_cannot_write_boundaries(sentencepiece_like):
    def ids_and_mask(text):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
        return tokenized(sentencepiece_like, messages, "vicuna")

    assert ids_and_mask("teach\U000ff4d1 me\U000ff4d0") == ids_and_mask("teach me")


def test_templates_without_boundaries_still_work(byte_level):
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    ids, mask = tokenized(byte_level, [{"role": "user", "content": "circle"}], template)
    assert byte_level.decode(list(itertools.compress(ids, mask))) == "circle"


@pytest.mark.skipif(
    not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"),
    reason="this release of transformers shifts the masks of other templates by the placeholders",
)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_other_templates_mark_answers_with_images_before_and_between_them(sentencepiece_like, padding_side):
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}{% endgeneration %}"
        "{% else %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endif %}"
        "{% endfor %}{{ '\n' }}{% endfor %}"
    )
    answers, messages = ["a red circle", "a blue square"], []
    for answer in answers:
        image = {"type": "image", "image": IMAGE, "boxes": [[0, 0, 9, 9]]}
        messages.append({"role": "user", "content": [image, {"type": "text", "text": "What?"}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    features = sentencepiece_like.apply_chat_template(
        [messages, messages[:2]],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    for row, expected in enumerate((answers, answers[:1])):
        learned = features["input_ids"][row][features["assistant_masks"][row].bool()]
        assert sentencepiece_like.decode(learned).split() == " ".join(expected).split()


def test_sanitized_user_text_writes_no_placeholder_and_no_control_token(byte_level):
    messages = [{"role": "user", "content": "<image> <|eot_id|> x"}]
    options = {"tokenize": True, "add_generation_prompt": True, "sanitize_control_tokens": True}
    if not hasattr(byte_level.tokenizer, "_mark_chat_inputs"):
        with pytest.raises(NotImplementedError, match="newer transformers"):
            byte_level.apply_chat_template(messages, "llama3", **options)
        return
    (ids,) = byte_level.apply_chat_template(messages, "llama3", **options)
    assert byte_level.image_token_id not in ids
    assert ids.count(byte_level.tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 1  # the template's own
    assert "<image> <|eot_id|> x" in byte_level.decode(ids)
    messages[0]["content"] = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "<image>"}]
    (ids,) = byte_level.apply_chat_template(messages, "llama3", **options)
    assert ids.count(byte_level.image_token_id) == 5


@pytest.mark.parametrize("conversation", [[], [[]], [[{"role": "user", "content": "Hello."}], []]])
@pytest.mark.parametrize("tokenize", [False, True])
def test_an_empty_conversation_is_an_error(processor, conversation, tokenize):
    with pytest.raises(ValueError, match="at least one message"):
        processor.apply_chat_template(conversation, tokenize=tokenize)
