"""What every source of teachers gives: first what it is, without loading it, then the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from statsvc.plan import Teacher

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From the shared view to pixels: resized straight to size x size, then (value / 255 - mean) / std.

    pad  side of the canvas of zeros in whose top left corner the normalized pixels are then placed; None: no canvas
    """

    size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: int | None = None

    @property
    def canvas(self) -> int:
        """Side of the square that the model sees."""
        return self.pad or self.size


@dataclass(frozen=True, slots=True)
class Resolved:
    """A teacher whose files were found and hashed, but not loaded.

    weights  digest over everything that decides what the model computes
    taps     where each output is taken, by output; an output without a tap is not wanted
    about    what else is worth recording: revision, where the preprocessing came from
    """

    plan: Teacher
    weights: str
    preprocessing: Preprocessing
    taps: dict[str, str]
    location: str = ""
    about: dict[str, Any] = field(default_factory=dict)


class Features(Protocol):
    """A loaded model: pixels float32 [B, 3, S, S] to outputs [B, T, D] and, for patches, their grid."""

    def eval(self) -> Any: ...

    def to(self, device: Any) -> Any: ...

    def __call__(self, pixels_B3SS: torch.Tensor) -> Mapping[str, torch.Tensor]: ...

    def grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of so many patches. Raises PlanError where they are no rectangle."""


class Source(Protocol):
    """One way to get teachers. `resolve` must not import torch: a run with nothing to do never loads a model."""

    def resolve(self, name: str, plan: Teacher) -> Resolved:
        """Find and hash the teacher's files. Raises PlanError that says how to get what is missing."""

    def load(self, resolved: Resolved) -> Features:
        """Build the model on the CPU. Raises PlanError where the weights do not fit."""
