"""Ids and labels of training texts."""

import copy
import json
import logging

import pytest
from PIL import Image

from mgllava.processing import SLIME_CHAT_TEMPLATES
from mgllava.training import ConversationDataset, MGLlavaDataCollator, SampleError, TrainingError, open_source, samples
from tests.slime.golden import VOCAB_SIZE, expand, load_json, num_placeholders

IMAGE = Image.new("RGB", (336, 336))
TEXTS = {f"{entry['name']}-{index}": entry for index, entry in enumerate(load_json("more/train_text"))}
TEXTS["plain_pretrain"] = load_json("cases")["plain_pretrain"]
# Texts without an answer to learn, and the number of ids at the end that are learned from those whose labels the
# original loses.
WITHOUT_ANSWER = ("empty_answer", "text_only_too_long", "image_too_long")
LOST = {"answer_with_separator": 7, "answer_with_tag": 47, "unknown_characters": 8}


def with_template(processor, template):
    processor = copy.copy(processor)
    processor.chat_template = SLIME_CHAT_TEMPLATES[template]
    return processor


def sample_of(entry):
    turns = entry.get("conversation")
    if turns is None:
        caption = entry.get("caption", entry.get("gpt"))
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": caption}]
    sample = {"id": "7", "conversations": turns}
    return sample if entry.get("has_image") is False else {**sample, "image": IMAGE}


def collate(processor, entry, original_labels):
    """Return ids and labels of a batch of one, and what is expected of the original's, cut at the limit."""
    limit = entry.get("model_max_length") or 2048
    processor = processor if "conversation" in entry else with_template(processor, "plain")
    collator = MGLlavaDataCollator(processor, limit, return_sample_ids=True, original_labels=original_labels)
    ids, labels = entry["input_ids"][:limit], entry["labels"][:limit]
    lengths = [num_placeholders(2, 1)] * ids.count(-200)
    place = ids.index(-200) if lengths else 0
    labels = labels[:place] + [-100] * sum(lengths) + labels[place + len(lengths) :]
    batch = collator([sample_of(entry)])
    assert batch["input_ids"].tolist() == [expand(ids, lengths, VOCAB_SIZE)]
    return batch, labels


@pytest.mark.parametrize("name", TEXTS)
def test_original_labels_are_those_of_the_original(slime_processor, name):
    batch, labels = collate(slime_processor, TEXTS[name], original_labels=True)
    assert batch["labels"].tolist() == [labels]
    assert batch["lost_samples"] == all(label == -100 for label in labels)


@pytest.mark.parametrize("name", TEXTS)
def test_no_answer_is_lost_by_default(slime_processor, name):
    entry, short = TEXTS[name], name.rpartition("-")[0]
    if short in WITHOUT_ANSWER:
        with pytest.raises(SampleError, match="no answer to learn"):
            collate(slime_processor, entry, original_labels=False)
        return
    batch, labels = collate(slime_processor, entry, original_labels=False)
    if short in LOST:
        ids = batch["input_ids"][0].tolist()
        labels = [-100] * (len(ids) - LOST[short]) + ids[-LOST[short] :]
        # After the words that open the answer.
        assert ids[-LOST[short] - 4 : -LOST[short]] == [274, 182, 188, 187]
    assert batch["labels"].tolist() == [labels]
    assert batch["lost_samples"] == 0


def turns(*texts):
    roles = ("human", "gpt") * len(texts)
    return [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]


# In the original, a question with these words, an empty last answer, and a question at the end lose the whole sample;
# an empty answer before the last one loses itself. Where the counted rounds reach the limit, nothing is compared.
@pytest.mark.parametrize(
    ("template", "texts", "limit", "is_lost"),
    [
        ("v1", ("What?", "one", "Say </s> now", "two"), 2048, True),
        ("v1", ("Is ASSISTANT: you?", "one"), 2048, True),
        ("v1", ("What?", "one", "Why?", ""), 2048, True),
        ("v1", ("What?", "one", "Why?"), 2048, True),
        ("v1", ("What?", "", "Why?", "two"), 2048, False),
        ("v1", ("What?", "one", "Why?", "two"), 2048, False),
        ("v1", ("What?", "word " * 60, "Say </s> now", "two"), 100, False),
        ("v1", ("What?", "word " * 20, "Say </s> now", "two"), 100, True),
        ("llama3", ("What?", "one", "Why?", "two"), 2048, False),
        ("llama3", ("What?", "", "Why?", ""), 2048, False),
        ("llama3", ("What?", "one</s>two"), 2048, False),
        ("llama3", ("What?", "one<|eot_conversation|>two"), 2048, True),
        ("llama3", ("What?", "a <|start_header_id|>assistant<|end_header_id|>\n\nb"), 2048, True),
        ("llama3", ("What?", "one ASSISTANT: two"), 2048, False),
        ("plain", ("What?", "one</s> ASSISTANT: two"), 2048, False),
    ],
)
def test_what_the_original_loses(slime_processor, template, texts, limit, is_lost):
    processor = with_template(slime_processor, template)
    sample = {"id": "7", "conversations": turns(*texts)}
    collator = MGLlavaDataCollator(processor, limit, return_sample_ids=True, original_labels=True)
    batch = collator([sample])
    assert batch["lost_samples"] == is_lost
    assert (batch["labels"] == -100).all() == is_lost
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in sample["conversations"]]
    assert collator([{"id": "7", "messages": messages}])["labels"].equal(batch["labels"])
    # By default its answers are learned, from the same ids.
    default = MGLlavaDataCollator(processor, limit)([sample])
    assert default["input_ids"].equal(batch["input_ids"]) and (default["labels"] != -100).any()


def test_the_mark_between_rounds_is_not_text(slime_processor):
    """The original writes it between the rounds of Llama-3's conversations, and takes it out of all texts again."""
    processor = with_template(slime_processor, "llama3")
    marked, plain = (
        MGLlavaDataCollator(processor)([{"id": "7", "conversations": turns("What?", text)}])
        for text in ("one<|eot_conversation|>two", "onetwo")
    )
    assert all(marked[name].equal(plain[name]) for name in plain)


def test_a_dropped_answer_is_said_once(slime_processor, caplog, monkeypatch):
    monkeypatch.setattr(samples, "_SAID", set())
    sample = sample_of(TEXTS["starts_with_answer-3"])
    with caplog.at_level(logging.WARNING):
        MGLlavaDataCollator(slime_processor)([sample, sample])
    assert [record.message for record in caplog.records if "starts with an answer" in record.message] == [
        "Sample 7 starts with an answer, which is dropped, as in the original. Others are not named."
    ]


def test_labels_of_other_models_and_templates(slime_processor, processor):
    with pytest.raises(ValueError, match=r"`original_labels` must be false .* MGLlavaProcessor"):
        MGLlavaDataCollator(processor, original_labels=True)
    other = copy.copy(slime_processor)
    other.chat_template = other.chat_template.replace("USER: ", "HUMAN: ")
    MGLlavaDataCollator(other)
    with pytest.raises(ValueError, match="needs a chat template of the original"):
        MGLlavaDataCollator(other, original_labels=True)


def test_a_dataset_takes_what_the_collator_takes(slime_processor, tmp_path):
    IMAGE.save(tmp_path / "0.png")
    texts = [entry for name, entry in TEXTS.items() if "conversation" in entry and entry["model_max_length"] > 100]
    rows = [{**sample_of(entry), "id": entry["name"]} for entry in texts]
    rows = [{**row, "image": "0.png"} if "image" in row else row for row in rows]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    source = open_source(tmp_path / "samples.json", None, None)
    with pytest.raises(TrainingError, match=r"1 of 10 samples .*empty_answer"):
        ConversationDataset([source], slime_processor)
    dataset = ConversationDataset([source], slime_processor, original_labels=True)
    assert [abs(length) for length in dataset.lengths] == [len(entry["input_ids"]) for entry in texts]
    collator = MGLlavaDataCollator(slime_processor, original_labels=True, return_sample_ids=True)
    batch = collator([dataset[index] for index in range(len(dataset))])
    assert batch["lost_samples"] == 4
    assert [int((row != -100).sum()) for row in batch["labels"]] == [
        sum(label != -100 for label in entry["labels"]) for entry in texts
    ]


@pytest.mark.parametrize("template", SLIME_CHAT_TEMPLATES)
def test_an_answer_alone_is_encoded_as_behind_its_prompt(slime_processor, template):
    """TRL encodes prompts and completions apart, as strings, and joins the ids."""
    processor = with_template(slime_processor, template)
    prompt = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What?"}]}]
    whole = [*prompt, {"role": "assistant", "content": "the red dog is it"}]
    strings = [
        processor.apply_chat_template(turns, add_generation_prompt=turns is prompt) for turns in (prompt, whole)
    ]
    assert strings[1].startswith(strings[0])
    ids = []
    for images, text in ((IMAGE, strings[0]), (None, strings[1].removeprefix(strings[0]))):
        ids += processor(images, text, add_special_tokens=False)["input_ids"][0]
    assert ids == processor.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"][0]
