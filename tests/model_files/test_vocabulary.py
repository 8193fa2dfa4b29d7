"""Tokenizers of language models that have a SentencePiece model only, such as Vicuna."""

import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from mgllava.model_files.vocabulary import load_tokenizer
from tests.golden_cases import GOLDEN

TEXTS = [
    "USER: ",
    "\nWhat is shown in this picture? ASSISTANT:",
    "A red circle.",
    "\n",
    "a\n\nb  c",
    "é ✓",
    "<|user|>",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        input=str(GOLDEN / "prompts.json"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def language_model(folder, model_file, **config):
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 4096, **specials, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("config", [{"legacy": False}, {"legacy": True}, {}], ids=str)
def test_ids_are_those_of_sentencepiece_before_and_after_saving(tmp_path, model_file, config):
    tokenizer = load_tokenizer(language_model(tmp_path, model_file, **config))
    tokenizer.save_pretrained(tmp_path / "saved")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    reference = sentencepiece.SentencePieceProcessor(str(model_file))
    # Without `legacy`, no space is put in front of a text that starts with one.
    texts = TEXTS if config == {"legacy": False} else [*TEXTS, " two  spaces"]
    for text in texts:
        expected = reference.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text
        assert reloaded(text, add_special_tokens=False)["input_ids"] == expected, text
    assert tokenizer.convert_tokens_to_ids("<image>") == reference.get_piece_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.pad_token == "<unk>"
    assert reference.decode(reference.encode("A red circle.")) == tokenizer.decode(
        tokenizer("A red circle.", add_special_tokens=False)["input_ids"]
    )
