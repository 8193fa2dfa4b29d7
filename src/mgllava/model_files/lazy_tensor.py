"""Tensors that stay in their files until they are wanted."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known and whose values are read by `load`.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        origin: Where the values come from and what is done to them, for reports and digests.
        load: Gives the values. They may lie in a memory-mapped file: read only.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """Cast floating-point values to another dtype."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(self.shape, dtype, f"{self.origin} as {dtype}", lambda: self.load().to(dtype))


def from_tensor(tensor: torch.Tensor, origin: str) -> LazyTensor:
    """Wrap a tensor, usually a memory-mapped one."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, origin, lambda: tensor.detach())


__all__ = ["LazyTensor", "from_tensor"]
