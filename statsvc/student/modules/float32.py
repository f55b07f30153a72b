"""Modules whose numbers stay float32 when the model around them is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import nn


class Float32Module(nn.Module):
    """A module whose buffers stay float32 under `half`, `bfloat16`, `double` and `to(dtype)` of any parent.

    They are statistics, not weights: rounded to 8 or 11 bits, targets would be those of another transform, and a
    moving average would stop moving.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self
