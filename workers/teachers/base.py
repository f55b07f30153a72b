"""What every source of teachers gives: first what it is, without loading it, then the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from statsvc.errors import PlanError
from statsvc.plan import INTERPOLATIONS, Teacher

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
    """A loaded model: pixels float32 [B, 3, S, S] to outputs [B, T, D] and, for patches, their grid.

    S is the canvas of the preprocessing.
    """

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


def chosen_taps(plan: Teacher, default: Mapping[str, str]) -> dict[str, str]:
    """A source's default taps with the plan's own in their place; null drops an output."""
    taps: dict[str, str | None] = {**default, **{str(output): tap for output, tap in plan.taps.items()}}
    return {output: tap for output, tap in taps.items() if tap is not None}


def chosen_preprocessing(
    key: str, plan: Teacher, own: Mapping[str, Any], giver: str, instead: str = ""
) -> Preprocessing:
    """From the plan, else what the model itself says: `own`, whose values are foreign.

    Raises PlanError for what neither gives: "<key>: <giver> gives <what>; add it to the plan<instead>".
    """
    size, interpolation, own_std = own.get("size"), own.get("interpolation"), _three(own.get("std"))
    found: dict[str, Any] = {
        "size": plan.size or (size if isinstance(size, int) and size > 0 else None),
        "interpolation": plan.interpolation or next((n for n in INTERPOLATIONS if n == interpolation), None),
        "mean": plan.mean or _three(own.get("mean")),
        "std": plan.std or (own_std if own_std and min(own_std) > 0 else None),
    }
    if unknown := [name for name, value in found.items() if value is None]:
        raise PlanError(
            f"{key}: {giver} gives {', '.join(unknown)}; add {'it' if len(unknown) == 1 else 'them'} to the "
            f"plan{instead}"
        )
    # A canvas as large as the image is none.
    return Preprocessing(**found, pad=plan.pad if plan.pad != found["size"] else None)


def _three(values: Any) -> tuple[float, float, float] | None:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return red, green, blue
