"""Scenes told instead of shown, for a language model that has not seen anything yet.

A told scene stands in a conversation where the picture will: one token for each cell of the grid and one for each
object. What they are made of is given by `attributes`, `cells` and `margin`; the language model fills in the
embeddings of the words.
"""

import random
from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mgllava import MGLlavaImageProcessor, MGLlavaProcessor
from mgllava.processing import CHAT_TEMPLATES
from mgllava.training.collator import encode_text

from .pictures import object_attributes
from .questions import CAPTION_REQUEST, KINDS, Question, ask, describe, reading_order
from .scenes import MAX_OBJECTS, Scene, make_scene

GRID = 8
CAPTION = "caption"
# Kinds of answers, by index.
ANSWERS = (*KINDS, CAPTION)
_QUESTIONS = 10
_CAPTION_EVERY = 5
# Scenes of no other data set have numbers as high as these.
_FIRST_SCENE = 1_000_000
_SCENES_TO_CHOOSE_FROM = 100


class ToldScenes(Dataset):
    """Told scenes with conversations about them.

    Items have `input_ids` (one placeholder for each told token), `labels` (-100 where nothing is learned), `kinds`
    (index in `ANSWERS` for each id of an answer, else -1), `attributes` (`(num_objects, 4)`, see
    [`object_attributes`]), `cells` (`(GRID * GRID, num_objects)`: 1 where an object has its center, else 0) and
    `margin` (`(GRID * GRID,)`: which share of the cell lies outside of the picture, which is in the middle of the
    square) and `found` (indices of the objects that have a token, best first as a detector gives them: in no order
    that means anything, with some missing and some twice).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Knows the placeholder `<image>`.
        split (`str`): See [`make_scene`].
        count (`int`): Number of scenes.
        growing (`float`, *optional*, defaults to 0.0): The first scene has one object; the limit grows over this share
            of the scenes. Looking up one of one, then of two, is how looking up is learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split: str, count: int, growing: float = 0.0):
        self.split, self.count, self.growing = split, count, growing
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
        scene = self._scene(index)
        if index % _CAPTION_EVERY == 0:
            turns = [Question(CAPTION, CAPTION_REQUEST, describe(scene))]
        else:
            turns = ask(scene, _QUESTIONS)
        objects, found = reading_order(scene), _found(scene)
        ids, learnt = self._encode(turns)
        position = ids.index(self.processor.image_token_id)
        told = GRID**2 + len(found)
        input_ids = torch.tensor(ids[:position] + [ids[position]] * told + ids[position + 1 :])
        answers = torch.tensor([0] * (position + told) + learnt[position + 1 :])
        # Each run of ids that are learnt is the answer to the next question.
        starts = (answers.diff(prepend=answers.new_zeros(1)) == 1).cumsum(0)
        kind_of_turn = torch.tensor([-1] + [ANSWERS.index(turn.kind) for turn in turns])
        learns = answers.bool() & (input_ids != self.processor.tokenizer.eos_token_id)
        return {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(answers == 0, -100),
            "kinds": kind_of_turn[starts].masked_fill(~learns, -1),
            "attributes": object_attributes(objects),
            "cells": _cells(scene),
            "margin": _margin(scene),
            "found": torch.tensor(found),
        }

    def _scene(self, index: int) -> Scene:
        """Take the first scene of a range that has something to ask and few enough objects."""
        grown = min(index / (self.growing * self.count), 1.0) if self.growing else 1.0
        limit = 1 + int((MAX_OBJECTS - 1) * grown**1.5)
        first = _FIRST_SCENE + index * _SCENES_TO_CHOOSE_FROM
        for number in range(first, first + _SCENES_TO_CHOOSE_FROM):
            scene = make_scene(self.split, number)
            if 0 < len(scene.objects) <= limit:
                return scene
        raise RuntimeError(f"no scene of at most {limit} objects from {self.split}/{first} on")

    def _encode(self, turns: Sequence[Question]) -> tuple[list[int], list[int]]:
        conversation = []
        for number, turn in enumerate(turns):
            content: list[dict[str, str]] = [{"type": "image"}] if number == 0 else []
            conversation.append({"role": "user", "content": [*content, {"type": "text", "text": turn.text}]})
            conversation.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        ids, learnt = encode_text(self.processor, conversation)
        assert learnt is not None  # the template marks answers
        return ids, learnt


def _found(scene: Scene) -> list[int]:
    """Draw the boxes that a detector might find, at least one."""
    rng = random.Random(f"{scene.id}/found")
    found = [index for index in range(len(scene.objects)) for _ in range(rng.choices((0, 1, 2), (1, 18, 1))[0])]
    rng.shuffle(found)
    return found or [0]


def _cells(scene: Scene) -> torch.Tensor:
    side = max(scene.width, scene.height)
    centers = torch.tensor([item.center for item in reading_order(scene)])
    corner = torch.tensor([side - scene.width, side - scene.height]) / 2
    column, row = ((centers + corner) * GRID / side).long().clamp(0, GRID - 1).unbind(-1)
    return F.one_hot(row * GRID + column, GRID**2).T.float()


def _margin(scene: Scene) -> torch.Tensor:
    side = max(scene.width, scene.height)
    inside = []
    for length in (scene.height, scene.width):
        edges = torch.arange(GRID + 1) * side / GRID - (side - length) / 2
        inside.append(edges.clamp(0, length).diff() * GRID / side)
    return 1 - (inside[0][:, None] * inside[1][None]).flatten()


def collate_told(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make a batch of `ToldScenes`. Padding stands behind, where causal attention does not see it."""

    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)

    cells = pad_sequence([sample["cells"].T for sample in samples], batch_first=True)
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "kinds": padded("kinds", -1),
        "attributes": padded("attributes", -1),
        "cells": cells.transpose(1, 2),
        "margin": padded("margin", 0),
        "found": padded("found", -1),
    }


__all__ = ["ANSWERS", "CAPTION", "GRID", "ToldScenes", "collate_told"]
