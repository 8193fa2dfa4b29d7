"""Tokenizer, embedding table and generation config with the placeholders of images and videos."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from transformers import AddedToken, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from mgllava.processing.text_chunks_common import IMAGE_TOKEN

from .errors import ConversionError, one_line
from .json_files import read_json
from .lazy_tensor import LazyTensor

# Tables with a multiple of 64 rows suit tensor cores and tensor parallelism; other LLaVA models have them too.
_ROW_MULTIPLE = 64
# Rows that are read at a time, to limit the memory of the mean of a table.
_ROW_BLOCK = 4096
# Name of a padding token of which only the id is known.
_PAD_TOKEN = "[PAD]"

# Tokens that end an answer in each chat template, in addition to EOS of the language model.
STOP_WORDS: dict[str, tuple[str, ...]] = {
    "vicuna": (),
    "llama3": ("<|eot_id|>",),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "yi": ("<|im_end|>", "<|endoftext|>"),
    "v1": (),
    "plain": (),
}


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the placeholders, rows of the language model's embedding table, and of the one in the saved model."""

    image_token_id: int
    original_rows: int
    padded_rows: int
    video_token_id: int | None = None


def load_tokenizer(
    folder: Path,
    argument: str = "llm",
    pad_token_id: int | None = None,
    placeholders: Sequence[str] = (IMAGE_TOKEN,),
) -> Any:
    """Load a language model's tokenizer, and add placeholders and, if there is none, a padding token.

    `pad_token_id` is used if the tokenizer does not name a padding token; the id after the last one is added.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = _read_unchanged(folder)
        else:
            with tempfile.TemporaryDirectory() as built:
                _build_tokenizer_json(folder, Path(built))
                tokenizer = _read_unchanged(Path(built))
    except Exception as error:  # the tokenizers library raises `Exception` itself
        raise ConversionError(
            f"`{argument}`: the tokenizer in {folder} cannot be read ({one_line(error)})."
        ) from error
    if tokenizer.pad_token is None and pad_token_id is not None:
        if pad_token_id == max(tokenizer.get_vocab().values(), default=-1) + 1:
            tokenizer.add_tokens([AddedToken(_PAD_TOKEN, special=True, normalized=False)], special_tokens=True)
        if 0 <= pad_token_id < len(tokenizer):
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    add_placeholders(tokenizer, placeholders)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConversionError(
            f"`{argument}`: the tokenizer in {folder} has no padding token and neither unknown nor end-of-sequence "
            "token to pad with. Set `pad_token` in its tokenizer_config.json."
        )
    return tokenizer


def add_placeholders(tokenizer: Any, placeholders: Sequence[str]) -> None:
    """Add placeholders that the tokenizer does not have, as tokens that text cannot change."""
    tokens = [AddedToken(token, special=True, normalized=False) for token in placeholders]
    tokenizer.add_tokens(tokens, special_tokens=True)


def _read_unchanged(folder: Path) -> Any:
    # transformers 5 rebuilds Llama tokenizers, which changes the ids after special tokens that the checkpoints were
    # trained with. The plain class uses `tokenizer.json` as it is.
    return PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")


def _build_tokenizer_json(folder: Path, output: Path) -> None:
    """Turn a SentencePiece model (Vicuna has nothing else) into a `tokenizer.json`, as transformers 4 did."""
    # By default, transformers would ask on the terminal whether remote code may run.
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path, "llm") if config_path.is_file() else {}
    if str(config.get("tokenizer_class", "")).startswith("Llama") and config.get("legacy") is not False:
        # Legacy tokenizers put a space in front of every piece of text, even if it starts with one.
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    tokenizer.save_pretrained(output)


def plan_vocabulary(image_token_id: int, original_rows: int, video_token_id: int | None = None) -> Vocabulary:
    """Choose the size of an embedding table that has a row for each placeholder: a multiple of 64."""
    rows = max(original_rows, image_token_id + 1, (video_token_id or 0) + 1)
    padded_rows = -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return Vocabulary(image_token_id, original_rows, padded_rows, video_token_id)


def grow_table(table: LazyTensor, rows: int) -> LazyTensor:
    """Append rows to an embedding table or an output head, each the mean of the old ones in float32."""
    old_rows = table.shape[0]
    if old_rows >= rows:
        return table

    def load() -> torch.Tensor:
        old = table.load()
        total = torch.zeros(table.shape[1:], dtype=torch.float32)
        for start in range(0, old_rows, _ROW_BLOCK):
            total += old[start : start + _ROW_BLOCK].float().sum(0)
        grown = torch.empty((rows, *table.shape[1:]), dtype=table.dtype)
        grown[:old_rows] = old
        grown[old_rows:] = (total / old_rows).to(table.dtype)
        return grown

    origin = f"{table.origin} + {rows - old_rows} rows, mean of the others"
    return LazyTensor((rows, *table.shape[1:]), table.dtype, origin, load)


def generation_config(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: Any,
    prompt_template: str,
    suppress_tokens: list[int],
    argument: str = "llm",
) -> GenerationConfig:
    """Return a generation config: greedy, as in the original's evaluation, up to the template's stop words."""
    # Only the ids are taken from the language model: its sampling settings are not part of MG-LLaVA.
    has_own = (folder / "generation_config.json").is_file()
    try:
        own = GenerationConfig.from_pretrained(folder) if has_own else config
    except Exception as error:  # a config may be wrong in many ways
        reason = one_line(error)
        raise ConversionError(
            f"`{argument}`: generation_config.json in {folder} cannot be read ({reason})."
        ) from error
    stop_ids: list[int] = []
    for ids in (own.eos_token_id, tokenizer.eos_token_id):
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(number) is int and number >= 0 for number in ids):
            raise ConversionError(f"`{argument}`: `eos_token_id` of {folder} must be whole numbers, got {ids}.")
        stop_ids += ids
    vocabulary = tokenizer.get_vocab()
    stop_ids += [vocabulary[word] for word in STOP_WORDS[prompt_template] if word in vocabulary]
    stop_ids = list(dict.fromkeys(stop_ids))
    config_class: Any = GenerationConfig  # untyped
    return config_class(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else own.bos_token_id,
        eos_token_id=stop_ids[0] if len(stop_ids) == 1 else stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=suppress_tokens,
    )


__all__ = [
    "STOP_WORDS",
    "Vocabulary",
    "add_placeholders",
    "generation_config",
    "grow_table",
    "load_tokenizer",
    "plan_vocabulary",
]
