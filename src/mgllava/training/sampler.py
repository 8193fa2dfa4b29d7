"""A sampler for batches of one modality and of similar lengths."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Batches that are sorted together: enough to find similar lengths, few enough to keep the order random.
_BATCHES_TOGETHER = 50


class ModalityLengthSampler(Sampler[int]):
    """Groups samples by modality (images, videos or only text) and by length, as the original does.

    Every batch (over all processes) has one modality, except for the last ones, which mix the samples that are left
    over. The group with the longest sample comes first, so that a training that runs out of memory does so at once.

    Args:
        lengths (`Sequence[int]`): Length of each sample in tokens, negative for samples without images and videos.
        batch_size (`int`): Samples of one optimizer step, over all processes and accumulated batches.
        seed (`int`, *optional*, defaults to 0): Random seed; the number of the epoch is added to it.
        modalities (`Sequence[str]`, *optional*): Modality of each sample; by default `lengths` tells those with
            images from those of only text.

    Raises:
        ValueError: If a length is zero, or there is another number of modalities.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int = 0, modalities: Sequence[str] | None = None
    ):
        if not all(lengths):
            raise ValueError("`lengths` must not be zero: positive for samples with an image, negative for others.")
        if modalities is None:
            modalities = ["image" if length > 0 else "text" for length in lengths]
        if len(modalities) != len(lengths):
            raise ValueError(
                f"`modalities` must have one entry for each of the {len(lengths)} lengths, got {len(modalities)}."
            )
        self.lengths = lengths
        # In alphabetical order: images, text, videos.
        self._groups: dict[str, list[int]] = {name: [] for name in sorted(set(modalities))}
        for index, modality in enumerate(modalities):
            self._groups[modality].append(index)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order.

        Args:
            epoch (`int`): Number of the epoch.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        together = max(1, min(len(self.lengths) // (self.batch_size * 4), _BATCHES_TOGETHER)) * self.batch_size
        groups: list[list[int]] = []
        left_over: list[int] = []
        for of_modality in self._groups.values():
            order = torch.randperm(len(of_modality), generator=generator).tolist()
            whole = len(order) // self.batch_size * self.batch_size
            left_over += [of_modality[position] for position in order[whole:]]
            groups += [
                [of_modality[position] for position in order[start : min(start + together, whole)]]
                for start in range(0, whole, together)
            ]
        groups = [groups[position] for position in torch.randperm(len(groups), generator=generator).tolist()]
        for group in groups:
            group.sort(key=self._length, reverse=True)
        longest = max(range(len(groups)), key=lambda number: self._length(groups[number][0]), default=0)
        if groups:
            groups.insert(0, groups.pop(longest))
        left_over.sort(key=self._length, reverse=True)
        for group in [*groups, left_over]:
            yield from group

    def _length(self, index: int) -> int:
        return abs(self.lengths[index])


__all__ = ["ModalityLengthSampler"]
