"""The tokenizer of the small model: byte-level BPE, learned from the words of the small world."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .architecture import VOCABULARY_SIZE

_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a tokenizer.

    A word has the same ids at the beginning of a text as within it: answers are encoded by themselves.

    Args:
        texts (`Iterable[str]`): Captions, questions and answers.

    Returns:
        `PreTrainedTokenizerFast`: With `VOCABULARY_SIZE` tokens at most; every text can be encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[_PAD, _BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, bos_token=_BOS, eos_token=_EOS)


__all__ = ["train_tokenizer"]
