"""Tokenization in chunks, as MG-LLaVA (arXiv 2406.17770) was trained.

The original encodes the text before and after an image each on its own, without special tokens, and puts the BOS id in
front by hand; in conversations also the answers, EOS and the separators. Tokenizers of the SentencePiece kind start
every chunk with a space piece and merges never cross chunks, so the ids differ from those of the whole string.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Private-use characters that a chat template writes between chunks; see `chat_templates_mgllava.py`.
CHUNK_BOUNDARY = "\U000ff4d0"
ANSWER_BOUNDARY = "\U000ff4d1"
BOUNDARIES = re.compile(f"[{CHUNK_BOUNDARY}{ANSWER_BOUNDARY}]")


@dataclass
class TextChunk:
    """A piece of text that is encoded alone, or the run of placeholders of one image.

    Attributes:
        text: The text; for an image its run of placeholders.
        num_image_tokens: Length of that run, 0 for text.
        is_answer: Whether the chunk is learnt in training.
    """

    text: str
    num_image_tokens: int = 0
    is_answer: bool = False


def split_text(
    text: str, placeholder: re.Pattern[str], runs: Iterator[tuple[str, int]], bos_token: str | None, boundaries: bool
) -> list[TextChunk]:
    """Cut a text at its images, after a leading BOS, and at the boundary characters.

    Args:
        text (`str`): The text with one placeholder per image.
        placeholder (`re.Pattern`): What marks an image; without groups.
        runs (`Iterator`): Gives, image by image, the run of placeholders and its length in tokens.
        bos_token (`str`, *optional*): The BOS token as text.
        boundaries (`bool`): Whether `CHUNK_BOUNDARY` and `ANSWER_BOUNDARY` are cuts; otherwise they are text.

    Returns:
        `list[TextChunk]`: The chunks that are not empty; boundary characters are gone.
    """
    chunks = []
    if bos_token and text.startswith(bos_token):
        chunks.append(TextChunk(bos_token))
        text = text[len(bos_token) :]
    cuts = f"{placeholder.pattern}|{BOUNDARIES.pattern}" if boundaries else placeholder.pattern
    is_answer, start = False, 0
    for cut in re.finditer(cuts, text):
        chunks.append(TextChunk(text[start : cut.start()], is_answer=is_answer))
        start = cut.end()
        if cut.group() in (CHUNK_BOUNDARY, ANSWER_BOUNDARY):
            is_answer = cut.group() == ANSWER_BOUNDARY
        else:
            run, length = next(runs)
            chunks.append(TextChunk(run, num_image_tokens=length))
    chunks.append(TextChunk(text[start:], is_answer=is_answer))
    return [chunk for chunk in chunks if chunk.text]


def encode_chunks(
    tokenizer: Any,
    texts: Sequence[Sequence[TextChunk]],
    *,
    image_token_id: int,
    add_special_tokens: bool | None = True,
    padding: Any = False,
    padding_side: str | None = None,
    pad_to_multiple_of: int | None = None,
    truncation: Any = False,
    max_length: int | None = None,
    return_attention_mask: bool | None = None,
    return_offsets_mapping: bool | None = False,
    return_assistant_tokens_mask: bool = False,
    sanitize_control_tokens: bool | None = False,
    return_tensors: Any = None,
    verbose: bool | None = True,
    **unsupported: Any,
) -> dict[str, list[Any]]:
    """Encode texts chunk by chunk and pad them; options as in a tokenizer's `__call__`.

    Args:
        tokenizer: A tokenizer of transformers, fast or slow.
        texts (`Sequence`): The chunks of each text.
        image_token_id (`int`): Id of the placeholder.
        add_special_tokens (`bool`): Whether to start with BOS where the tokenizer has one and the text does not.
        padding (`bool` or `str`): As in the tokenizer's `pad`, like the next two and `return_attention_mask`.
        padding_side (`str`, *optional*): `"left"` or `"right"`; by default the tokenizer's.
        pad_to_multiple_of (`int`, *optional*): Pad to a multiple of this length.
        truncation: Whether to cut texts to `max_length` on the tokenizer's `truncation_side`; never within images.
        max_length (`int`, *optional*): Limit for truncation (by default the tokenizer's), or target of padding.
        return_attention_mask (`bool`, *optional*): Whether to return `attention_mask`; by default the tokenizer's.
        return_offsets_mapping (`bool`): Whether to return the characters `(start, end)` of each token in the text
            with expanded images; fast tokenizers only.
        return_assistant_tokens_mask (`bool`): Whether to return `assistant_masks`, 1 for each token of an answer.
        sanitize_control_tokens (`bool`): As in the tokenizer's `apply_chat_template` (newer transformers).
        return_tensors: Ignored; the result is lists, which the caller converts.
        verbose: Ignored.
        **unsupported: Options that cannot hold for chunks.

    Returns:
        `dict[str, list]`: `input_ids`, and `attention_mask`, `offset_mapping`, `assistant_masks` where asked for, one
        list per text.

    Raises:
        ValueError: If truncation would cut the tokens of an image, or an unsupported option is set.
    """
    if wanted := sorted(name for name, value in unsupported.items() if value):
        raise ValueError(f"{wanted} must not be set: text is encoded in chunks around the images. Leave them out.")

    to_encode = [chunk.text for chunks in texts for chunk in chunks if not chunk.num_image_tokens]
    options = {"sanitize_control_tokens": True} if sanitize_control_tokens else {}
    encoded = (
        tokenizer(
            to_encode,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=bool(return_offsets_mapping),
            verbose=False,
            **options,
        )
        if to_encode
        else {}
    )
    ids_of_chunks = iter(encoded.get("input_ids", []))
    offsets_of_chunks = iter(encoded.get("offset_mapping", []))
    # By hand, as the original does: not every tokenizer adds BOS by itself.
    starts_with_bos = add_special_tokens and tokenizer.bos_token_id is not None

    input_ids: list[list[int]] = []
    offsets: list[list[tuple[int, int]]] = []
    masks: list[list[int]] = []
    for chunks in texts:
        has_bos = bool(chunks) and chunks[0].text == tokenizer.bos_token
        front = [tokenizer.bos_token_id] if starts_with_bos and not has_bos else []
        ids, spans, mask = list(front), [(0, 0)] * len(front), [0] * len(front)
        position = 0
        for chunk in chunks:
            if chunk.num_image_tokens:
                width = len(chunk.text) // chunk.num_image_tokens
                chunk_ids = [image_token_id] * chunk.num_image_tokens
                chunk_spans = [(i * width, (i + 1) * width) for i in range(chunk.num_image_tokens)]
            else:
                chunk_ids = next(ids_of_chunks)
                chunk_spans = next(offsets_of_chunks, [])
            ids += chunk_ids
            spans += [(position + start, position + end) for start, end in chunk_spans]
            mask += [int(chunk.is_answer)] * len(chunk_ids)
            position += len(chunk.text)
        keep = slice(None)
        if truncation and truncation != "do_not_truncate":
            keep = _kept_tokens(ids, max_length or tokenizer.model_max_length, tokenizer.truncation_side)
            _check_images_whole(ids, ids[keep], image_token_id)
        input_ids.append(ids[keep])
        offsets.append(spans[keep])
        masks.append(mask[keep])

    padded = tokenizer.pad(
        {"input_ids": input_ids},
        padding=padding,
        max_length=max_length,
        pad_to_multiple_of=pad_to_multiple_of,
        padding_side=padding_side,
        return_attention_mask=return_attention_mask,
        verbose=False,
    )
    output = dict(padded)
    side = padding_side or tokenizer.padding_side
    if return_offsets_mapping:
        output["offset_mapping"] = _pad_like(offsets, output["input_ids"], (0, 0), side)
    if return_assistant_tokens_mask:
        output["assistant_masks"] = _pad_like(masks, output["input_ids"], 0, side)
    return output


def _kept_tokens(ids: list[int], max_length: int, side: str) -> slice:
    return slice(max(0, len(ids) - max_length), None) if side == "left" else slice(max_length)


def _check_images_whole(ids: list[int], kept: list[int], image_token_id: int) -> None:
    before, after = ids.count(image_token_id), kept.count(image_token_id)
    if before != after:
        raise ValueError(
            f"`max_length` must leave room for the images: truncating {len(ids)} tokens to {len(kept)} would keep "
            f"{after} of {before} image tokens. Raise `max_length`, or give fewer images or boxes."
        )


def _pad_like(rows: list[list[Any]], padded: list[list[int]], value: Any, side: str) -> list[list[Any]]:
    output = []
    for row, target in zip(rows, padded, strict=True):
        padding = [value] * (len(target) - len(row))
        output.append(padding + row if side == "left" else row + padding)
    return output
