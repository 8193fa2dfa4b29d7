"""Processors with a tokenizer of each kind."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mgllava.processing import CHAT_TEMPLATES, MGLlavaImageProcessor, MGLlavaProcessor
from tests.golden_cases import GOLDEN

SPECIALS = ["<|bos|>", "<|eos|>", "<|eot_id|>", "<|end|>", "<|im_end|>", "<|im_start|>", "<|start_header_id|>"]


def processor_of(tokenizer, **kwargs):
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_processor = MGLlavaImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return MGLlavaProcessor(image_processor, tokenizer, image_seq_length=4, chat_template=CHAT_TEMPLATES, **kwargs)


def tokenized(processor, messages, chat_template=None, **options):
    """Tokenize a conversation; return its ids, and the mask of those that are learned."""
    features = processor.apply_chat_template(
        messages, chat_template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return features["input_ids"][0], features["assistant_masks"][0]


@pytest.fixture(scope="module")
def sentencepiece_like():
    return processor_of(AutoTokenizer.from_pretrained(GOLDEN / "llm"))


@pytest.fixture(scope="module")
def byte_level():
    """A GPT-2-like tokenizer: no space in front, a leading space belongs to the word, BOS by a post-processor."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    prompts = json.loads((GOLDEN / "prompts.json").read_text())
    corpus = [*prompts["questions"], *prompts["answers"], prompts["system"], json.dumps(prompts["templates"])]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(corpus, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|eos|>", padding_side="left"
    )
    return processor_of(tokenizer)
