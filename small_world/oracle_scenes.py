"""Conversations about scenes whose image tokens are made by an oracle, to pretrain the language model.

Instead of a vision tower, an oracle that knows the scene makes the tokens: one for each cell of the grid and one for
each object. This module gives the contents of the tokens (`attributes`, `cells` and `margin`);
`parts.language_model` turns them into embeddings.
"""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mgllava import MGLlavaImageProcessor, MGLlavaProcessor
from mgllava.processing import CHAT_TEMPLATES

from .frames import cells_of_centers
from .pictures import object_attributes
from .questions import CAPTION_REQUEST, GRID, KINDS, Question, ask, describe, reading_order
from .scenes import MAX_OBJECTS, Scene, SceneObject, Split, make_scene

CAPTION = "caption"
# Kinds of answers, by index.
ANSWERS = (*KINDS, CAPTION)
_QUESTIONS = 10
_CAPTION_EVERY = 5
# Higher than the numbers of the scenes of all other data sets.
_FIRST_SCENE = 10_000_000
_SCENES_TO_CHOOSE_FROM = 100
# The padding value of each field of a batch.
_PADDING = {
    "input_ids": 0,
    "conversations": -1,
    "labels": -100,
    "kinds": -1,
    "attributes": -1,
    "cells": 0,
    "margin": 0,
    "found": -1,
}


@dataclass(frozen=True)
class Lesson:
    """A stage of the curriculum: its share of all scenes, the kinds of answers, and the most objects in a scene."""

    share: float
    answers: tuple[str, ...]
    max_objects: int


# A curriculum: few objects and few kinds of questions first. Without it, the model soon learned to look objects up by
# color, but not by shape within 29,000 scenes; with it, it learned both within 10,000.
LESSONS = (
    Lesson(0.12, ("color", "shape"), 4),
    Lesson(0.07, ("color", "shape", "reading"), 6),
    Lesson(0.13, ("color", "shape", "reading", "existence", "count"), 8),
    Lesson(0.20, KINDS, 8),
    Lesson(0.48, ANSWERS, MAX_OBJECTS),
)
EVERYTHING = LESSONS[-1:]


class OracleScenes(Dataset):
    """`count` scenes with questions about them, each a conversation of its own, for a tokenizer that has `<image>`.

    The conversations about a scene share a prefix, so that the scene is computed once for ten questions. They must not
    attend to each other: an answer must come from the scene, not from another answer.

    Items have

    - `input_ids`: the prefix, with a placeholder for each oracle token, then the conversations;
    - `conversations`: the number of the conversation of each id, 0 for the prefix;
    - `labels`: -100 for ids that are not learned;
    - `kinds`: index in `ANSWERS` for each id of an answer, else -1;
    - `attributes` `(num_objects, 4)`: see [`object_attributes`];
    - `cells` `(num_objects,)`: the cell that contains the center of the object, see [`cells_of_centers`];
    - `margin` `(GRID * GRID,)`: the share of the cell that lies outside of the picture, which is centered;
    - `found`: indices of the objects that have a token, in random order, with some missing and some twice, as from a
      detector.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, count: int, lessons: Sequence[Lesson] = EVERYTHING
    ):
        self.split, self.count, self.lessons = split, count, lessons
        self._ends = list(accumulate(lesson.share for lesson in lessons))
        self.processor = MGLlavaProcessor(
            image_processor=MGLlavaImageProcessor(),
            tokenizer=tokenizer,
            image_seq_length=GRID**2,
            num_tokens_per_box=1,
            chat_template=CHAT_TEMPLATES["vicuna"],
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene, turns = self._scene(index)
        objects, found = reading_order(scene), _found(scene)
        ids, answers, kinds, conversations = [], [], [], []
        for number, turn in enumerate(turns):
            of_turn, learned = self._encode(turn)
            position = of_turn.index(self.processor.image_token_id)
            if number == 0:
                ids = of_turn[:position] + [of_turn[position]] * (GRID**2 + len(found))
                answers, conversations, kinds = [0] * len(ids), [0] * len(ids), [-1] * len(ids)
            ids += of_turn[position + 1 :]
            answers += learned[position + 1 :]
            conversations += [number + 1] * (len(ids) - len(conversations))
            kinds += [ANSWERS.index(turn.kind)] * (len(ids) - len(kinds))
        input_ids, learns = torch.tensor(ids), torch.tensor(answers).bool()
        is_word = learns & (input_ids != self.processor.tokenizer.eos_token_id)
        return {
            "input_ids": input_ids,
            "conversations": torch.tensor(conversations),
            "labels": input_ids.masked_fill(~learns, -100),
            "kinds": torch.tensor(kinds).masked_fill(~is_word, -1),
            "attributes": object_attributes(objects),
            "cells": _cells(scene, objects),
            "margin": _margin(scene),
            "found": torch.tensor(found),
        }

    def _scene(self, index: int) -> tuple[Scene, list[Question]]:
        """Return the first scene of a range that suits the lesson, with the questions about it."""
        progress = index / self.count * self._ends[-1]
        lesson = self.lessons[bisect_right(self._ends, progress)]
        first = _FIRST_SCENE + index * _SCENES_TO_CHOOSE_FROM
        for number in range(first, first + _SCENES_TO_CHOOSE_FROM):
            scene = make_scene(self.split, number)
            if not 0 < len(scene.objects) <= lesson.max_objects:
                continue
            if CAPTION in lesson.answers and index % _CAPTION_EVERY == 0:
                return scene, [Question(CAPTION, CAPTION_REQUEST, describe(scene))]
            turns = [question for question in ask(scene) if question.kind in lesson.answers]
            if turns:
                return scene, turns[:_QUESTIONS]
        raise RuntimeError(f"no scene for {lesson} in {self.split}/{first} and the scenes after it")

    def _encode(self, turn: Question) -> tuple[list[int], list[int]]:
        """Encode a conversation of one question: its ids with one placeholder, and which of them are learned."""
        question = [{"type": "image"}, {"type": "text", "text": turn.text}]
        answer = [{"type": "text", "text": turn.answer}]
        conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, learned = self.processor.encode_text(conversation)
        assert learned is not None  # the template marks answers
        return ids, learned


def _found(scene: Scene) -> list[int]:
    """Choose objects at random as a detector might find them, at least one."""
    rng = random.Random(f"{scene.id}/found")
    found = [index for index in range(len(scene.objects)) for _ in range(rng.choices((0, 1, 2), (1, 18, 1))[0])]
    rng.shuffle(found)
    return found or [0]


def _cells(scene: Scene, objects: Sequence[SceneObject]) -> torch.Tensor:
    centers = torch.tensor([item.center for item in objects]) + torch.tensor(scene.corner)
    return cells_of_centers(centers.repeat(1, 2), GRID, scene.side)


def _margin(scene: Scene) -> torch.Tensor:
    columns, rows = (
        (torch.arange(GRID + 1) * scene.side / GRID - start).clamp(0, length).diff() * GRID / scene.side
        for start, length in zip(scene.corner, (scene.width, scene.height), strict=True)
    )
    return 1 - (rows[:, None] * columns[None]).flatten()


def collate_oracle_scenes(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make a batch of `OracleScenes`."""
    return {
        name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
        for name, value in _PADDING.items()
    }


__all__ = ["ANSWERS", "CAPTION", "EVERYTHING", "LESSONS", "Lesson", "OracleScenes", "collate_oracle_scenes"]
