"""Chat templates, and the chunks in which texts are encoded.

**Templates.** A conversation starts with BOS, so that a rendered prompt is the beginning of every longer conversation.
An answer is closed by EOS or a suffix; then comes the separator and, after EOS, BOS again. Images of a user turn go to
its front, one `<image>` line each, and the rest of that turn is stripped; they may be content blocks or a literal
`<image>` in the text. With `literal_image_token=False` an `<image>` in the text stays where it is. In templates of
models for videos, the same holds for `<video>`; images and videos keep their order.

**Chunks.** As in training, every piece of a text is encoded alone, without special tokens: the text before and after
an image, the answer with its suffix, EOS, the separator (a family may cut at images only, see `join_text`); the BOS id
is put in front by hand. Tokenizers of the SentencePiece kind start every chunk with a space piece, and merges never
cross chunks, so the ids differ from those of the whole string. The cuts are found in two ways, which agree:

- A template writes `chunk_boundary` before every piece that is given and `answer_boundary` before every piece that is
  learned, if the caller passes these two characters. By default it writes neither.
- In a rendered string without them, the pieces are found by the strings that the template writes between the texts of
  a conversation ([`ChatFormat`]). These are read off its rendering of a probe conversation.

If a message itself contains such a string, `protect_text` puts an invisible character into it, which is removed
before the text is encoded.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"

# Private-use characters: the boundaries that a template writes, and the guard that prevents a part of a message from
# being taken for a delimiter.
CHUNK_BOUNDARY = "\U000ff4d0"
ANSWER_BOUNDARY = "\U000ff4d1"
GUARD = "\U000ff4d2"
BOUNDARY_NAMES = {"chunk_boundary": CHUNK_BOUNDARY, "answer_boundary": ANSWER_BOUNDARY}
PRIVATE_CHARACTERS = re.compile(f"[{CHUNK_BOUNDARY}{ANSWER_BOUNDARY}{GUARD}]")
_BOUNDARIES = re.compile(f"[{CHUNK_BOUNDARY}{ANSWER_BOUNDARY}]")
_FOREIGN = "is not one of the processor's"
_UNMARKED_ANSWERS = "writes no text between questions and answers, by which answers could be found"
# The texts of a probe conversation (question, answer, question, answer), and its system message.
_PROBE, _SYSTEM = "\U000ff4d4\U000ff4d5\U000ff4d6\U000ff4d7", "\U000ff4d8"

_TEMPLATE = """
{%- set system_start, system_end = SYSTEM_START, SYSTEM_END -%}
{%- set user_start, user_end = USER_START, USER_END -%}
{%- set generation_prompt, suffix, separator = GENERATION_PROMPT, SUFFIX, SEPARATOR -%}
{%- set closed_by_eos, image_end = CLOSED_BY_EOS, IMAGE_END -%}
{%- set answer_start, closes_empty_answers, has_questions = ANSWER_START, CLOSES_EMPTY_ANSWERS, HAS_QUESTIONS -%}
{%- set has_videos = HAS_VIDEOS -%}
{%- set given = chunk_boundary | default('') -%}
{%- set learned = answer_boundary | default('') -%}
{%- set state = namespace(system=DEFAULT_SYSTEM, text='', media='', expected='user') -%}
{%- if tools or documents -%}
  {{- raise_exception('This model was not trained with tools or documents: `tools` and `documents` must be empty.') -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set state.text = '' -%}
  {%- set state.media = '' -%}
  {%- if message['content'] is string -%}
    {%- set state.text = message['content'] -%}
  {%- elif message['content'] is undefined or message['content'] is none -%}
    {{- raise_exception('`content` must be a string or a list of blocks, message ' ~ loop.index ~ ' has none.') -}}
  {%- elif message['content'] is mapping or message['content'] is not iterable -%}
    {{- raise_exception('`content` must be a string or a list of blocks, message ' ~ loop.index ~
                        ' has something else.') -}}
  {%- else -%}
    {%- for block in message['content'] -%}
      {%- if block['type'] == 'text' and block['text'] is not string -%}
        {{- raise_exception('`text` of a content block must be a string, message ' ~ loop.index ~ ' has another.') -}}
      {%- elif block['type'] == 'text' -%}
        {%- set state.text = state.text + block['text'] -%}
      {%- elif block['type'] in ['image', 'image_url'] and message['role'] == 'user' -%}
        {%- set state.media = state.media + '<image>' + image_end -%}
      {%- elif block['type'] in ['image', 'image_url'] -%}
        {{- raise_exception('Images must be in user turns, got one in a message of role ' ~ message['role'] ~ '.') -}}
      {%- elif has_videos and block['type'] in ['video', 'video_url'] and message['role'] == 'user' -%}
        {%- set state.media = state.media + '<video>' + image_end -%}
      {%- elif has_videos and block['type'] in ['video', 'video_url'] -%}
        {{- raise_exception('Videos must be in user turns, got one in a message of role ' ~ message['role'] ~ '.') -}}
      {%- else -%}
        {{- raise_exception("Content blocks must be 'text' or 'image'" ~ (" or 'video'" if has_videos else '') ~
                            ", got '" ~ block['type'] ~ "'.") -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['tool_calls'] -%}
    {{- raise_exception('This model was not trained with tools, message ' ~ loop.index ~ ' has `tool_calls`.') -}}
  {%- elif message['role'] == 'system' and loop.first and loop.last -%}
    {{- raise_exception('A conversation must have a user turn, got a system message alone.') -}}
  {%- elif message['role'] == 'system' and loop.first -%}
    {%- set state.system = system_start + state.text + system_end -%}
  {%- elif message['role'] != state.expected -%}
    {{- raise_exception('Turns must alternate user, assistant, user, ... after an optional system message, got ' ~
                        message['role'] ~ ' as message ' ~ loop.index ~ '.') -}}
  {%- elif message['role'] == 'user' -%}
    {%- if literal_image_token | default(true) -%}
      {%- for piece in state.text.split('<image>') -%}
        {%- if has_videos -%}
          {%- set state.media = state.media + ('<video>' + image_end) * piece.count('<video>') -%}
        {%- endif -%}
        {%- set state.media = state.media + ('' if loop.last else '<image>' + image_end) -%}
      {%- endfor -%}
      {%- set state.text = state.text.replace('<image>', '') -%}
      {%- if has_videos -%}
        {%- set state.text = state.text.replace('<video>', '') -%}
      {%- endif -%}
    {%- endif -%}
    {%- if not has_questions -%}
      {%- set state.text = state.media.replace(image_end, '') -%}
    {%- elif state.media -%}
      {%- set state.text = (state.media + state.text.strip()).strip() -%}
    {%- endif -%}
    {%- set is_first_turn = loop.index0 == (1 if messages[0]['role'] == 'system' else 0) -%}
    {%- if is_first_turn or closed_by_eos -%}
      {{- bos_token or "" -}}
    {%- endif -%}
    {{- given + (state.system if is_first_turn else '') + user_start + state.text + user_end -}}
    {%- if not loop.last or add_generation_prompt -%}
      {{- generation_prompt -}}
    {%- endif -%}
    {%- set state.expected = 'assistant' -%}
  {%- else -%}
    {%- generation -%}
      {%- if state.text or closes_empty_answers -%}
        {{- learned + answer_start + state.text + suffix -}}
      {%- endif -%}
      {%- if closed_by_eos -%}
        {{- learned ~ eos_token -}}
      {%- endif -%}
    {%- endgeneration -%}
    {{- given + separator + given -}}
    {%- set state.expected = 'user' -%}
  {%- endif -%}
{%- endfor -%}
"""


def build_chat_template(
    *,
    system: tuple[str, str],
    user: tuple[str, str],
    generation_prompt: str,
    suffix: str = "",
    separator: str = "",
    closed_by_eos: bool = False,
    default_system: str = "",
    image_end: str = "\n",
    answer_start: str = "",
    closes_empty_answers: bool = True,
    has_questions: bool = True,
    has_videos: bool = False,
) -> str:
    """Make the chat template of a language model; a pair holds the strings before and after a text.

    `default_system` is written in front of a conversation without a system message, `image_end` after each image, and
    `answer_start` before each answer, as a part of it. Without `has_questions`, the text of questions is dropped. With
    `has_videos`, videos are accepted like images.
    """
    fields = {
        "SYSTEM_START": system[0],
        "SYSTEM_END": system[1],
        "USER_START": user[0],
        "USER_END": user[1],
        "GENERATION_PROMPT": generation_prompt,
        "SUFFIX": suffix,
        "SEPARATOR": separator,
        "CLOSED_BY_EOS": closed_by_eos,
        "DEFAULT_SYSTEM": default_system,
        "IMAGE_END": image_end,
        "ANSWER_START": answer_start,
        "CLOSES_EMPTY_ANSWERS": closes_empty_answers,
        "HAS_QUESTIONS": has_questions,
        "HAS_VIDEOS": has_videos,
    }
    template = _TEMPLATE
    for name, value in fields.items():
        template = template.replace(name, json.dumps(value))  # a JSON string is a Jinja string too
    return template.strip()


# A position in a text, and whether what follows is learned.
Cut = tuple[int, bool]


@dataclass(frozen=True)
class Delimiter:
    """The string that a template writes between two texts of a conversation.

    Attributes:
        text: The string.
        cuts: Where it is cut, relative to its start.
    """

    text: str
    cuts: tuple[Cut, ...]

    def cuts_at(self, position: int) -> list[Cut]:
        """Return the cuts of this delimiter where it stands at a position."""
        return [(position + offset, is_answer) for offset, is_answer in self.cuts]


@dataclass(frozen=True)
class ChatFormat:
    """The strings by which the rendered conversations of a chat template are cut.

    Attributes:
        starts: What a conversation may start with after BOS.
        opening: From a question to its answer.
        between: From an answer to the next question.
        closing: From the last answer to the end.
    """

    starts: tuple[str, ...]
    opening: Delimiter
    between: Delimiter
    closing: Delimiter

    @property
    def prompt_end(self) -> str:
        """The end of a prompt, which an answer follows."""
        return self.opening.text[: self.opening.cuts[0][0]]


def read_format(template: str, special_tokens: Mapping[str, Any]) -> ChatFormat | None:
    """Return the format of a template's strings; `None` if it writes no boundaries as [`build_chat_template`]'s do.

    `special_tokens` is the tokenizer's `special_tokens_map`, whose names templates use.
    """
    tokens = tuple(sorted((name, value) for name, value in special_tokens.items() if isinstance(value, str)))
    return _read_format(template, tokens)


@lru_cache(maxsize=64)
def _read_format(template: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatFormat | None:
    """Render probe conversations, and find the strings around their texts."""

    def render(*messages: tuple[str, str]) -> str:
        conversation = [{"role": role, "content": text} for role, text in messages]
        rendered: Any = render_jinja_template([conversation], chat_template=template, **variables)
        return str(rendered[0][0])

    variables: dict[str, Any] = {**dict(special_tokens), **BOUNDARY_NAMES}
    turns = list(zip(("user", "assistant") * 2, list(_PROBE), strict=True))
    try:
        head, opening, between, second, closing = re.split(f"[{_PROBE}]", render(*turns))
    except Exception:  # a template may refuse anything, in any way
        return None
    starts = [_BOUNDARIES.split(head)[-1]]
    with suppress(Exception):  # some templates have no system message
        starts.append(_BOUNDARIES.split(render(("system", _SYSTEM), turns[0]).split(_SYSTEM)[0])[-1])
    delimiters = (Delimiter(*_take_boundaries(marked)) for marked in (opening, between, closing))
    chat = ChatFormat(tuple(filter(None, starts)), *delimiters)
    is_cut_at_answer = [is_learned for _, is_learned in chat.opening.cuts] == [True]
    is_usable = second == opening and is_cut_at_answer and chat.between.cuts and not chat.between.cuts[-1][1]
    return chat if chat.starts and chat.opening.text and chat.between.text and is_usable else None


def chat_formats(
    chat_template: Any, known_templates: Iterable[str], special_tokens: Mapping[str, Any]
) -> tuple[ChatFormat, ...]:
    """List the formats by which a processor cuts strings, in the order in which it tries them.

    Known templates come after the processor's own. They are left out if one of its own does not write boundaries,
    because its strings may look like theirs.
    """
    own = list(chat_template.values()) if isinstance(chat_template, Mapping) else [chat_template or ""]
    writing = [template for template in own if writes_boundaries(template)]
    known = list(known_templates) if len(writing) == len([template for template in own if template]) else []
    formats = [read_format(template, special_tokens) for template in [*writing, *known]]
    return tuple(dict.fromkeys(chat for chat in formats if chat is not None))


def writes_boundaries(template: str) -> bool:
    """Tell whether a chat template writes the boundary characters that are passed to it."""
    return "chunk_boundary" in template


def _take_boundaries(text: str) -> tuple[str, tuple[Cut, ...]]:
    """Take the boundary characters out of a text, and note where they were."""
    found = enumerate(_BOUNDARIES.finditer(text))
    cuts = tuple((match.start() - number, match.group() == ANSWER_BOUNDARY) for number, match in found)
    return _BOUNDARIES.sub("", text), cuts


@dataclass
class _Pieces:
    """A text with its cuts.

    Attributes:
        text: The text, without boundary characters.
        cuts: Where it is cut.
        bos: Length of the BOS that the text starts with; `None` if it has none and needs one.
        repeated: A delimiter where only a message can contain it.
        prompt_end: The end of the prompt of an answer that the text starts with.
    """

    text: str
    cuts: Sequence[Cut]
    bos: int | None
    repeated: str | None = None
    prompt_end: str = ""

    def split(self) -> list[tuple[str, bool]]:
        """Return the pieces after BOS that are not empty, without guards, and whether they are learned."""
        pieces, start, is_answer = [], self.bos or 0, False
        for end, is_next_answer in [*self.cuts, (len(self.text), False)]:
            pieces.append((self.text[start:end].replace(GUARD, ""), is_answer))
            start, is_answer = max(start, end), is_next_answer
        return [piece for piece in pieces if piece[0]]


def _cut(text: str, bos_token: str | None, chats: Iterable[ChatFormat]) -> _Pieces:
    """Find the cuts of a text, by its boundary characters if it has any."""
    bos = bos_token or ""
    if _BOUNDARIES.search(text):
        text, cuts = _take_boundaries(text)
        # The BOS of some language models is also the first token of a template.
        is_template = cuts[0][0] == 0 and any(text.startswith(chat.starts) for chat in chats)
        is_whole = bos and cuts[0] != (0, True)  # an answer alone needs no BOS
        return _Pieces(text, cuts, len(bos) if text.startswith(bos) and not is_template else None if is_whole else 0)
    for chat in chats:
        if text.startswith(chat.starts):
            return _cut_by_format(text, 0, chat, is_answer=False)
        if bos and text.startswith(bos) and text.startswith(chat.starts, len(bos)):
            return _cut_by_format(text, len(bos), chat, is_answer=False)
    # A part of a conversation, such as an answer alone: its first delimiter shows what it starts with.
    start = len(bos) if text.startswith(bos) else 0
    attempts = [_cut_by_format(text, start, chat, is_answer=None) for chat in chats]
    attempts = [pieces for pieces in attempts if pieces.cuts]
    ended = [pieces for pieces in attempts if pieces.cuts[-1][0] == len(text)]
    return next(iter(ended or attempts), _Pieces(text, [], start))


def _cut_by_format(text: str, start: int, chat: ChatFormat, is_answer: bool | None) -> _Pieces:
    """Find the cuts of a text that a template rendered; `is_answer`: whether it starts with an answer."""
    cuts: list[Cut] = []
    position, repeated, prompt_end = start, None, ""
    while True:
        found = []
        if is_answer is not True:
            found.append((_find(text, chat.opening.text, position), chat.opening))
        if is_answer is not False:
            found.append((_find(text, chat.between.text, position), chat.between))
            found.append((_find_last(text, chat.closing.text, position), chat.closing))
        found = [(place, delimiter) for place, delimiter in found if place >= 0]
        place, delimiter = min(found, key=lambda item: item[0], default=(len(text), None))
        if is_answer and 0 <= _find(text, chat.opening.text, position) < place:
            repeated = chat.opening.text
        if delimiter is None:
            return _Pieces(text, cuts, start, repeated, prompt_end)
        if is_answer is None and delimiter is not chat.opening:
            cuts.append((start, True))
            prompt_end = chat.prompt_end
        cuts += delimiter.cuts_at(place)
        position = place + len(delimiter.text)
        is_answer = cuts[-1][1] if cuts else is_answer
        if delimiter is chat.closing:
            return _Pieces(text, cuts, start, repeated, prompt_end)


def _find(text: str, literal: str, start: int) -> int:
    """Find a delimiter that is not broken by a guard."""
    place = text.find(literal, start)
    # A guard breaks a longer delimiter from inside, but stands in front of a single character.
    while len(literal) == 1 and place > 0 and text[place - 1] == GUARD:
        place = text.find(literal, place + 1)
    return place


def _find_last(text: str, literal: str, start: int) -> int:
    """Find a delimiter that a text ends with; -1 if it does not."""
    place = len(text) - len(literal)
    return place if literal and place >= start and _find(text, literal, place) == place else -1


def protect_text(marked: str, bos_token: str | None, chat: ChatFormat | None, chats: Sequence[ChatFormat]) -> str:
    """Remove the boundary characters from a text that `chat` rendered, so that `chats` find its cuts without them.

    If a message contains a delimiter, a guard is put before its last character, where it does not change the rendering
    of a shorter conversation. If the cuts would still not be found, the boundary characters stay.
    """
    truth = _cut(marked, bos_token, chats)
    if chat in chats and chat is not None:
        ends = _false_delimiters(truth, bos_token, chat, chats)
        text = truth.text
        for end in sorted(ends, reverse=True):
            text = text[: end - 1] + GUARD + text[end - 1 :]
        if _cut(text, bos_token, chats).split() == truth.split():
            if ends:
                logger.warning_once(
                    "A message of the conversation contains a string that the chat template writes between messages, "
                    f"such as {chat.opening.text!r}. The invisible character U+{ord(GUARD):X} was put into it, which "
                    "this processor removes again; other tokenizers would encode it."
                )
            return text
    is_foreign = chat is not None
    logger.warning_once(
        f"The chat template of this conversation {_FOREIGN if is_foreign else _UNMARKED_ANSWERS}: the string keeps "
        f"the private-use characters U+{ord(CHUNK_BOUNDARY):X} and U+{ord(ANSWER_BOUNDARY):X}, where this processor "
        "cuts it; other tokenizers would encode them."
        + (" Set `processor.chat_template` to that template." if is_foreign else "")
    )
    return marked


def _false_delimiters(
    truth: _Pieces, bos_token: str | None, chat: ChatFormat, chats: Iterable[ChatFormat]
) -> set[int]:
    """Find the ends of parts of messages that would be taken for a delimiter or the start of a conversation."""
    text, cuts = truth.text, truth.cuts
    ends = set()
    answers = []
    for index, (position, is_answer) in enumerate(cuts):
        if is_answer and not (index and cuts[index - 1][1]):
            end = next((place for place, is_learned in cuts[index:] if not is_learned), len(text))
            answers.append((position, end))
    is_open = bool(answers) and answers[-1][1] == len(text)
    for place in _occurrences(text, chat.opening.text):
        end = place + len(chat.opening.text)
        is_prompt = end == len(text) and not is_open
        is_opening = any(start == cut for start, _ in answers for cut, _ in chat.opening.cuts_at(place))
        if not (is_prompt or is_opening):
            ends.add(end)
    for start, stop in answers:
        for place in _occurrences(text, chat.between.text, start, stop):
            if not set(chat.between.cuts_at(place)) <= set(cuts):
                ends.add(place + len(chat.between.text))
        # An answer may be processed alone.
        for first in {bos_token or "", *(word for other in chats for word in other.starts)} - {""}:
            if text.startswith(first, start):
                ends.add(start + len(first))
    last = len(text) - len(chat.closing.text)
    if is_open and text.endswith(chat.closing.text) and not set(chat.closing.cuts_at(last)) <= set(cuts):
        ends.add(len(text))
    return ends


def _occurrences(text: str, literal: str, start: int = 0, stop: int | None = None) -> Iterator[int]:
    """Yield the places of a string, including those that overlap."""
    place = text.find(literal, start)
    while place >= 0 and (stop is None or place < stop):
        yield place
        place = text.find(literal, place + 1)


@dataclass
class TextChunk:
    """A piece of text that is encoded alone, or the run of placeholders of one image or video.

    Attributes:
        text: The text; for an image or a video its run of placeholders.
        num_image_tokens: Length of that run, 0 for text.
        token_id: Id of the placeholder in that run.
        is_answer: Whether the chunk is learned in training.
        is_bos: Whether this is the leading BOS; its text is empty if the text does not have it.
        answers: Where answers start and end in a text with more than an answer.
        context: Text that is encoded in front of it, without its tokens.
    """

    text: str
    num_image_tokens: int = 0
    token_id: int = -1
    is_answer: bool = False
    is_bos: bool = False
    answers: tuple[tuple[int, int], ...] = ()
    context: str = ""

    @property
    def is_text(self) -> bool:
        """Whether the tokenizer has to encode the chunk."""
        return not (self.num_image_tokens or self.is_bos)


def split_text(
    text: str,
    placeholder: re.Pattern[str],
    runs: Mapping[str, tuple[int, Iterator[int]]],
    bos_token: str | None,
    chats: Sequence[ChatFormat] = (),
    in_context: bool = False,
) -> list[TextChunk]:
    """Cut a text after a leading BOS, at its images and videos, and between the pieces of a conversation.

    `placeholder` finds their tokens; `runs` holds the id of each and yields the number of placeholders of image after
    image, or video after video; `chats` are the formats by which a text without boundary characters is cut. With
    `in_context`, an answer without its prompt, such as TRL's completions, gets the end of the prompt as context, so
    that it is encoded as in the whole conversation. Empty chunks and private characters are left out.
    """
    pieces = _cut(text, bos_token, chats)
    if pieces.repeated:
        logger.warning_once(
            f"`text` holds {pieces.repeated!r} again before the answer is closed. The answer is assumed to start "
            "after the first one. If the first one is part of a message, render the conversation with the processor's "
            "`apply_chat_template`, which keeps them apart."
        )
    chunks = []
    if bos_token and pieces.bos != 0:
        chunks.append(TextChunk(bos_token if pieces.bos else "", is_bos=True))
    for piece, is_answer in pieces.split():
        start = 0
        for cut in placeholder.finditer(piece):
            chunks.append(TextChunk(piece[start : cut.start()], is_answer=is_answer))
            token_id, lengths = runs[cut.group()]
            length = next(lengths)
            chunks.append(TextChunk(cut.group() * length, num_image_tokens=length, token_id=token_id))
            start = cut.end()
        chunks.append(TextChunk(piece[start:], is_answer=is_answer))
    chunks = [chunk for chunk in chunks if chunk.text or chunk.is_bos]
    if in_context and chunks and chunks[0].is_answer:
        chunks[0].context = pieces.prompt_end
    return chunks


def join_text(chunks: Sequence[TextChunk]) -> list[TextChunk]:
    """Join the chunks of text between two images, and note where answers are."""
    joined: list[TextChunk] = []
    for chunk in chunks:
        if not chunk.is_text:
            joined.append(chunk)
            continue
        if not (joined and joined[-1].is_text):
            joined.append(TextChunk("", context=chunk.context))
        whole = joined[-1]
        start = len(whole.text)
        whole.text += chunk.text
        if chunk.is_answer:
            whole.answers += ((start, len(whole.text)),)
    return joined


@dataclass
class _Row:
    """An encoded text.

    Attributes:
        ids: Its ids.
        spans: Where each token starts and ends in the text with runs of placeholders; empty unless requested.
        is_answer: 1 for each token that is learned.
        length: Number of characters so far.
    """

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    is_answer: list[int] = field(default_factory=list)
    length: int = 0

    def add(self, chunk: TextChunk, ids: list[int], spans: Iterable[tuple[int, int]]) -> None:
        """Append the tokens of a chunk."""
        self.ids += ids
        spans = list(spans)
        self.spans += [(self.length + start, self.length + end) for start, end in spans]
        if chunk.answers:
            self.is_answer += [int(any(first <= start < end for first, end in chunk.answers)) for start, _ in spans]
        else:
            self.is_answer += [int(chunk.is_answer)] * len(ids)
        self.length += len(chunk.text)

    def truncate(self, max_length: int, side: str, placeholder_ids: Mapping[str, int]) -> None:
        """Cut off tokens at one side; raise a `ValueError` if that would cut an image or a video."""
        kept = slice(max(0, len(self.ids) - max_length), None) if side == "left" else slice(max_length)
        for modality, token_id in placeholder_ids.items():
            before, after = self.ids.count(token_id), self.ids[kept].count(token_id)
            if before != after:
                raise ValueError(
                    f"`max_length` must leave room for the {modality}s: truncating {len(self.ids)} tokens to "
                    f"{len(self.ids[kept])} would keep {after} of {before} {modality} tokens. Raise `max_length`, or "
                    f"pass fewer {modality}s{' or frames' if modality == 'video' else ''}."
                )
        self.ids, self.spans, self.is_answer = self.ids[kept], self.spans[kept], self.is_answer[kept]


def encode_chunks(
    tokenizer: Any,
    texts: Sequence[Sequence[TextChunk]],
    placeholder_ids: Mapping[str, int],
    *,
    add_special_tokens: bool | None = True,
    truncation: Any = False,
    max_length: int | None = None,
    padding_side: str | None = None,
    return_offsets_mapping: bool | None = False,
    sanitize_control_tokens: bool | None = False,
    **options: Any,
) -> dict[str, list[Any]]:
    """Encode texts chunk by chunk into lists; the other options are those of a tokenizer's `__call__`.

    BOS is put in front by hand, as in the original, since not every tokenizer adds it; with
    `add_special_tokens=False`, only in front of conversations. `placeholder_ids` are the ids of the placeholders of
    each modality, which are not truncated. `offset_mapping` refers to the text with runs of
    placeholders; `assistant_masks` is 1 for each token of an answer.
    """
    pad_options = {name: options.pop(name, None) for name in ("pad_to_multiple_of", "return_attention_mask")}
    padding = options.pop("padding", False)
    for name in ("return_tensors", "verbose"):
        options.pop(name, None)
    if wanted := sorted(name for name, value in options.items() if value):
        raise ValueError(f"{wanted} must not be set: text is encoded in chunks around the images. Leave them out.")

    needs_spans = any(chunk.answers or chunk.context for chunks in texts for chunk in chunks)
    tokenizer_options: dict[str, Any] = {"return_offsets_mapping": needs_spans or bool(return_offsets_mapping)}
    if sanitize_control_tokens:
        tokenizer_options["sanitize_control_tokens"] = True
    adds_bos = bool(add_special_tokens) and tokenizer.bos_token_id is not None
    rows = _encode_rows(tokenizer, texts, adds_bos, tokenizer_options)
    if truncation and truncation != "do_not_truncate":
        for row in rows:
            row.truncate(max_length or tokenizer.model_max_length, tokenizer.truncation_side, placeholder_ids)
    output = dict(
        tokenizer.pad(
            {"input_ids": [row.ids for row in rows]},
            padding=padding,
            max_length=max_length,
            padding_side=padding_side,
            verbose=False,
            **pad_options,
        )
    )
    side = padding_side or tokenizer.padding_side
    if return_offsets_mapping:
        output["offset_mapping"] = _pad_like(output["input_ids"], [row.spans for row in rows], (0, 0), side)
    output["assistant_masks"] = _pad_like(output["input_ids"], [row.is_answer for row in rows], 0, side)
    return output


def _encode_rows(
    tokenizer: Any,
    texts: Sequence[Sequence[TextChunk]],
    adds_bos: bool,
    options: Mapping[str, Any],
) -> list[_Row]:
    """Encode the chunks of all texts in one call of the tokenizer, and join those of each text."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False, **options}
    to_encode = [chunk.context + chunk.text for chunks in texts for chunk in chunks if chunk.is_text]
    encoded: Mapping[str, Any] = tokenizer(to_encode, **options) if to_encode else {}
    ids_of_chunks = iter(encoded.get("input_ids", []))
    spans_of_chunks = iter(encoded.get("offset_mapping", []))
    rows = []
    for chunks in texts:
        row = _Row()
        if adds_bos and not (chunks and chunks[0].is_bos):
            row.add(TextChunk("", is_bos=True), [tokenizer.bos_token_id], [(0, 0)])
        for chunk in chunks:
            if chunk.is_bos:
                row.add(chunk, [tokenizer.bos_token_id], [(0, len(chunk.text))])
            elif count := chunk.num_image_tokens:
                width = len(chunk.text) // count
                row.add(chunk, [chunk.token_id] * count, [(i * width, (i + 1) * width) for i in range(count)])
            else:
                ids: list[int] = next(ids_of_chunks)
                spans: list[tuple[int, int]] = next(spans_of_chunks, [])
                if length := len(chunk.context):
                    kept = [index for index, (start, _) in enumerate(spans) if start >= length]
                    if kept and spans[kept[0]][0] == length:
                        ids, spans = [ids[index] for index in kept], [spans[index] for index in kept]
                        spans = [(start - length, end - length) for start, end in spans]
                    else:  # a token lies across the start of the answer, which the prompt alone does not have
                        alone = tokenizer([chunk.text], **options)
                        ids, spans = alone["input_ids"][0], alone["offset_mapping"][0]
                row.add(chunk, ids, spans)
        rows.append(row)
    return rows


def _pad_like(padded: list[list[int]], rows: list[list[Any]], value: Any, side: str) -> list[list[Any]]:
    """Pad rows to the lengths of rows that are padded."""
    output = []
    for target, row in zip(padded, rows, strict=True):
        padding = [value] * (len(target) - len(row))
        output.append(padding + row if side == "left" else row + padding)
    return output


__all__ = [
    "BOUNDARY_NAMES",
    "IMAGE_TOKEN",
    "PRIVATE_CHARACTERS",
    "VIDEO_TOKEN",
    "ChatFormat",
    "TextChunk",
    "build_chat_template",
    "chat_formats",
    "encode_chunks",
    "join_text",
    "protect_text",
    "read_format",
    "split_text",
    "writes_boundaries",
]
