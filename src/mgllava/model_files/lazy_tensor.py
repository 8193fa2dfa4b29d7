"""Tensors that are read from their files when they are needed."""

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
        origin: The file and name of the values and the operations on them, for reports and digests.
        load: Returns the values, which must not be modified: they may be mapped from a file.
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
