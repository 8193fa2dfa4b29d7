import itertools

import pytest
import torch

from mgllava.training import ModalityLengthSampler

LENGTHS = [int(x) for x in torch.randint(5, 400, (1003,), generator=torch.Generator().manual_seed(0))]
LENGTHS = [length if index % 3 else -length for index, length in enumerate(LENGTHS)]


def batches(sampler, size):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_every_sample_comes_once_in_batches_of_one_modality():
    found = batches(ModalityLengthSampler(LENGTHS, 16, seed=1), 16)
    assert sorted(index for batch in found for index in batch) == list(range(len(LENGTHS)))
    # 669 = 41 * 16 + 13 with images and 334 = 20 * 16 + 14 without: what is left over is mixed.
    assert all(len({LENGTHS[index] > 0 for index in batch}) == 1 for batch in found[:61])
    assert any(LENGTHS[batch[0]] > 0 for batch in found[:61]) and any(LENGTHS[batch[0]] < 0 for batch in found[:61])


def test_lengths_within_a_batch_are_alike():
    def spread(found):
        return sum(max(abs(LENGTHS[i]) for i in b) - min(abs(LENGTHS[i]) for i in b) for b in found) / len(found)

    grouped = batches(ModalityLengthSampler(LENGTHS, 16, seed=1), 16)[:61]
    shuffled = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0)).tolist()
    assert spread(grouped) < spread([shuffled[i : i + 16] for i in range(0, 976, 16)]) / 3


def test_the_longest_sample_is_in_the_first_batch():
    longest = max(range(990), key=lambda index: abs(LENGTHS[index]))
    lengths = list(LENGTHS)
    lengths[longest] = 5000
    # It may also be among those that are left over, which come last.
    assert longest in batches(ModalityLengthSampler(lengths, 16, seed=3), 16)[0]


@pytest.mark.parametrize(("count", "groups"), [(16 * 40, 4), (16 * 408, 9), (16 * 3, 3)])
def test_a_quarter_of_the_batches_but_at_most_fifty_are_sorted_together(count, groups):
    """More would make the order less random, fewer the lengths less alike."""
    order = list(ModalityLengthSampler(range(1, count + 1), 16))
    assert sum(after > before for before, after in itertools.pairwise(order)) == groups - 1


def test_what_is_left_over_is_sorted_too():
    last = [abs(LENGTHS[index]) for index in list(ModalityLengthSampler(LENGTHS, 16))[61 * 16 :]]
    assert len(last) == 27 and last == sorted(last, reverse=True)


def test_the_order_follows_from_seed_and_epoch():
    assert list(ModalityLengthSampler(LENGTHS, 16)) == list(ModalityLengthSampler(LENGTHS, 16, seed=0))
    assert list(ModalityLengthSampler(LENGTHS, 16, seed=1)) != list(ModalityLengthSampler(LENGTHS, 16, seed=2))
    sampler, other = ModalityLengthSampler(LENGTHS, 16, seed=1), ModalityLengthSampler(LENGTHS, 16, seed=1)
    first = list(sampler)
    assert list(sampler) == first == list(other)
    sampler.set_epoch(1)
    assert list(sampler) != first
    other.set_epoch(1)
    assert list(other) == list(sampler)


@pytest.mark.parametrize("lengths", [[5], [5, 6, 7], [-5, 6], [-3] * 40])
def test_small_sets_and_single_modalities(lengths):
    sampler = ModalityLengthSampler(lengths, 16)
    assert sorted(sampler) == list(range(len(lengths))) and len(sampler) == len(lengths)


def test_videos_have_batches_of_their_own():
    modalities = [
        ("text" if length < 0 else "video" if index % 5 else "image") for index, length in enumerate(LENGTHS)
    ]
    found = batches(ModalityLengthSampler(LENGTHS, 16, seed=1, modalities=modalities), 16)
    assert sorted(index for batch in found for index in batch) == list(range(len(LENGTHS)))
    whole = sum(modalities.count(name) // 16 for name in ("image", "text", "video"))
    assert all(len({modalities[index] for index in batch}) == 1 for batch in found[:whole])
    with pytest.raises(ValueError, match="each of the 2 lengths, got 1"):
        ModalityLengthSampler([1, 2], 1, modalities=["image"])


def test_a_length_of_zero_is_refused():
    with pytest.raises(ValueError, match="lengths"):
        ModalityLengthSampler([3, 0], 2)
