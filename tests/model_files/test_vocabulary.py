"""Tokenizers of language models that have a SentencePiece model only, such as Vicuna."""

import json
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from mgllava.conversion import ConversionError
from mgllava.model_files.lazy_tensor import from_tensor
from mgllava.model_files.vocabulary import generation_config, grow_table, load_tokenizer, plan_vocabulary
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


# Tokens of language models with a `tokenizer.json`


@pytest.fixture
def llm(tmp_path):
    """A tokenizer of 420 tokens that names no padding token."""
    folder = shutil.copytree(GOLDEN / "llm", tmp_path / "llm")
    (folder / "special_tokens_map.json").unlink()

    def name(**tokens):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config = {key: value for key, value in config.items() if not key.endswith("_token")}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **tokens}))
        return folder

    return name


@pytest.mark.parametrize(
    ("tokens", "pad_token_id", "expected"),
    [
        ({"pad_token": "</s>", "unk_token": "<unk>"}, 5, "</s>"),
        ({"unk_token": "<unk>", "eos_token": "</s>"}, None, "<unk>"),
        ({"eos_token": "</s>"}, None, "</s>"),
        ({"unk_token": "<unk>"}, 2, "</s>"),
        ({"unk_token": "<unk>"}, 0, "<unk>"),
        ({"unk_token": "<unk>"}, 420, "[PAD]"),
        ({"unk_token": "<unk>"}, 421, "<unk>"),
        ({"unk_token": "<unk>"}, -1, "<unk>"),
    ],
)
def test_padding_token_is_the_tokenizers_or_that_of_the_id(llm, tokens, pad_token_id, expected):
    tokenizer = load_tokenizer(llm(**tokens), pad_token_id=pad_token_id)
    assert tokenizer.pad_token == expected and tokenizer.padding_side == "left"
    added = ["[PAD]", "<image>"] if expected == "[PAD]" else ["<image>"]
    assert tokenizer.convert_tokens_to_ids(added) == [420, 421][: len(added)]
    # Special tokens, which a normalizer does not change.
    for number in range(420, len(tokenizer)):
        token = tokenizer.added_tokens_decoder[number]
        assert token.special and not token.normalized
    assert len(tokenizer) == 420 + len(added)


def test_tokenizer_without_any_token_to_pad_with_is_refused(llm):
    with pytest.raises(ConversionError, match=r"`vlm`: the tokenizer in .* has no padding token"):
        load_tokenizer(llm(), "vlm")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("vicuna", []),
        ("llama3", ["<|eot_id|>"]),
        ("phi3", ["<|end|>", "<|endoftext|>"]),
        ("yi", ["<|im_end|>", "<|endoftext|>"]),
        ("v1", []),
        ("plain", []),
    ],
)
def test_answers_end_at_the_stop_words_of_the_template(tmp_path, template, words):
    """As the original's templates name them."""
    names = ["a", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|im_end|>"]
    vocabulary = {name: 10 + number for number, name in enumerate(names)}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=2, bos_token_id=None, pad_token_id=7)
    config = PreTrainedConfig(eos_token_id=[3, 2], bos_token_id=1)
    found = generation_config(tmp_path, config, tokenizer, template, [8, 9])
    assert found.eos_token_id == [3, 2, *(vocabulary[word] for word in words)]
    assert (found.bos_token_id, found.pad_token_id, found.suppress_tokens) == (1, 7, [8, 9])
    # The generation config of the language model tells the ids, if there is one, but not how to sample.
    GenerationConfig(eos_token_id=2, bos_token_id=5, do_sample=True, temperature=0.3).save_pretrained(tmp_path)
    found = generation_config(tmp_path, config, tokenizer, template, [])
    ids = [2, *(vocabulary[word] for word in words)]
    assert found.eos_token_id == (ids if words else 2) and found.bos_token_id == 5
    assert not found.do_sample and found.temperature in (None, 1.0)
    tokenizer.bos_token_id = 0
    assert generation_config(tmp_path, config, tokenizer, template, []).bos_token_id == 0


@pytest.mark.parametrize("ids", [-1, True, 2.0, [2, None], "2"])
def test_ends_that_are_not_ids_are_refused(tmp_path, ids):
    tokenizer = SimpleNamespace(get_vocab=dict, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    with pytest.raises(ConversionError, match=r"`vlm`: `eos_token_id` of .* must be whole numbers"):
        generation_config(tmp_path, SimpleNamespace(eos_token_id=ids), tokenizer, "vicuna", [], "vlm")


@pytest.mark.parametrize(
    ("ids", "rows", "padded"),
    [((63,), 10, 64), ((64,), 10, 128), ((3,), 64, 64), ((3,), 65, 128), ((3, 64), 10, 128), ((3, 63), 10, 64)],
)
def test_tables_have_a_row_for_each_placeholder(ids, rows, padded):
    found = plan_vocabulary(ids[0], rows, *ids[1:])
    assert (found.image_token_id, found.original_rows, found.padded_rows) == (ids[0], rows, padded)
    assert found.video_token_id == (ids[1] if len(ids) > 1 else None)


def test_new_rows_are_the_mean_of_the_old_ones():
    """Also of tables that are read in several parts."""
    old = torch.randn(5000, 3).half()
    table = from_tensor(old, "a")
    grown = grow_table(table, 5003)
    assert grown.shape == (5003, 3) and grown.dtype == torch.float16 and grown.origin != table.origin
    assert torch.equal(grown.load()[:5000], old)
    torch.testing.assert_close(grown.load()[5000:], old.double().mean(0).half().expand(3, 3), rtol=0, atol=1e-4)
    assert grow_table(table, 5000) is table and grow_table(table, 4999) is table
    bias = grow_table(from_tensor(torch.tensor([1.0, 3.0]), "b"), 3)
    assert bias.load().tolist() == [1.0, 3.0, 2.0]
