"""From whatever a model gives to tokens.

Suffixes: B = images, T = tokens, D = channels, S = side of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from statsvc.errors import PlanError


class Taken(nn.Module):
    """A model, and the function that runs it and takes its outputs."""

    def __init__(self, model: nn.Module, take: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self.model = model
        self._take = take

    def forward(self, pixels_B3SS: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return self._take(pixels_B3SS)

    def grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of so many patches."""
        return square_grid(tokens)


def square_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of so many patches of a square image. Raises PlanError."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise PlanError(f"{tokens} tokens of a square image are no square grid; choose another tap for patches")
    return side, side


def as_patches(x: Any, channels_last: bool = False) -> torch.Tensor:
    """[B, T, D], also from a map [B, D, rows, columns] or, channels last, [B, rows, columns, D]. Raises PlanError."""
    if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4):
        raise PlanError(f"patches must be tokens [B, T, D] or a map [B, D, rows, columns], not {describe(x)}")
    if x.ndim == 3:
        return x
    return x.flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)


def as_summary(x: Any) -> torch.Tensor:
    """[B, S, D], also from one vector [B, D] for each image. Raises PlanError."""
    if not isinstance(x, torch.Tensor) or x.ndim not in (2, 3):
        raise PlanError(f"a summary must be vectors [B, D] or [B, S, D], not {describe(x)}")
    return x[:, None] if x.ndim == 2 else x


def named(given: Any, taps: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tapped ones among what a model gave: a mapping, a named tuple, a tuple, or a single tensor.

    The values of a tuple are called "0", "1", ...; a single tensor is the summary if it is [B, D], else the patches.
    Raises PlanError for a tap that is not among them.
    """
    if isinstance(given, torch.Tensor):
        output = "summary" if given.ndim == 2 else "patches"
        if output not in taps:
            raise PlanError(f"taps.{output}: the model gives {describe(given)} and nothing else; do not drop it")
        values, taps = dict.fromkeys(taps[output].split("|"), given), {output: taps[output]}
    else:
        values = mapping(given)
    outputs = {}
    for output, tap in taps.items():
        found = next((values[name] for name in tap.split("|") if name in values), None)
        if found is None and "|" not in tap:
            raise PlanError(f"taps.{output}: {tap!r} is not among what the model gives: {', '.join(values)}")
        if found is not None:
            outputs[output] = as_patches(found) if output == "patches" else as_summary(found)
    return outputs


def mapping(given: Any) -> dict[str, Any]:
    """What a model gave, by name. Raises PlanError."""
    if hasattr(given, "_asdict"):
        given = given._asdict()
    if isinstance(given, Mapping):
        return {str(name): value for name, value in given.items()}
    if isinstance(given, (tuple, list)):
        return {str(number): value for number, value in enumerate(given)}
    raise PlanError(f"the model must give a mapping, a tuple or a tensor, not {describe(given)}")


def describe(x: Any) -> str:
    """A tensor's shape, or what else it is."""
    return f"a tensor {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
