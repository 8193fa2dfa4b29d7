"""Text embeddings of a detector's prompts, which do not depend on the image: kept in memory, saved, loaded."""

import json
import os
from collections.abc import Callable, Sequence

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging

logger = logging.get_logger(__name__)


class PromptEmbeds:
    """A table of prompts and their embeddings that grows by the prompts it has not seen.

    Args:
        embed (`Callable`): Gives fp32 embeddings of shape `(num_prompts, width)` of a list of prompts.
        fingerprint (`str`): Names the text tower; saved embeddings of another one are not used.
    """

    def __init__(self, embed: Callable[[list[str]], torch.Tensor], fingerprint: str):
        self._embed = embed
        self._fingerprint = fingerprint
        self._rows: dict[str, int] = {}
        self._table: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._rows

    def add(self, prompts: Sequence[str]) -> None:
        """Embed those prompts that are not in the table.

        Args:
            prompts (`Sequence[str]`): Prompts; repeated ones are embedded once.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if missing:
            self._append(missing, self._embed(missing))

    def get(self, prompts: Sequence[Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up the prompts of several images.

        Args:
            prompts (`Sequence[Sequence[str]]`): The prompts of each image, at least one in all.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: fp32 embeddings of shape `(num_images, max_prompts, width)` and a bool
            mask of shape `(num_images, max_prompts)` that is `False` where an image has fewer prompts than others.
        """
        self.add([prompt for of_image in prompts for prompt in of_image])
        assert self._table is not None  # there is a prompt
        rows = [torch.tensor([self._rows[prompt] for prompt in of_image]) for of_image in prompts]
        # Sequences of -1 are longer than any row number, so they mark the padding.
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(self._table.device)
        return self._table[padded.clamp(min=0)], padded >= 0

    def _append(self, prompts: list[str], embeds: torch.Tensor) -> None:
        self._table = embeds if self._table is None else torch.cat([self._table, embeds.to(self._table.device)])
        for prompt in prompts:
            self._rows[prompt] = len(self._rows)

    def save(self, path: str | os.PathLike) -> None:
        """Write all embeddings to a safetensors file, with the prompts in its metadata.

        Args:
            path (`str` or `os.PathLike`): The file; it appears when it is complete.
        """
        metadata = {"prompts": json.dumps(list(self._rows)), "text_tower": self._fingerprint}
        temporary = f"{os.fspath(path)}.incomplete"
        assert self._table is not None  # who has nothing to save does not call this
        save_file({"prompt_embeds": self._table.cpu().contiguous()}, temporary, metadata=metadata)
        os.replace(temporary, path)

    def load(self, path: str | os.PathLike, device: torch.device) -> None:
        """Add the embeddings of a file, unless another text tower made them.

        Args:
            path (`str` or `os.PathLike`): A file that [`~PromptEmbeds.save`] wrote.
            device (`torch.device`): Where to keep them.

        Raises:
            ValueError: If the file does not hold one row for each prompt that it names.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("text_tower") != self._fingerprint:
                logger.warning(f"Ignoring {os.fspath(path)!r}: another text tower made these embeddings.")
                return
            embeds = file.get_tensor("prompt_embeds")
        prompts = json.loads(metadata.get("prompts", "[]"))
        if embeds.ndim != 2 or len(prompts) != len(embeds) or len(set(prompts)) != len(prompts):
            raise ValueError(
                f"{os.fspath(path)!r} must hold one embedding for each prompt, got {len(prompts)} prompts for a "
                f"tensor of shape {tuple(embeds.shape)}. Remove the file: prompts are then embedded again."
            )
        new = [row for row, prompt in enumerate(prompts) if prompt not in self._rows]
        if new:
            self._append([prompts[row] for row in new], embeds[new].to(device))
