"""Train the tokenizer of the small model, a byte-level BPE."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .architecture import VOCABULARY_SIZE

_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `VOCABULARY_SIZE` tokens, which can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    # With a prefix space a word has the same ids at the start of a text, such as an answer, as within a text.
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
