"""Outputs of a transformers model as tokens, whatever its architecture calls them.

Suffixes: B = images, T = tokens, D = channels, S = side of the image in pixels.
"""

import inspect
import re
from typing import Any

import torch
from torch import nn

from statsvc.errors import PlanError
from workers.teachers.tokens import as_patches, mapping, square_grid


class TappedModel(nn.Module):
    """A model of the transformers library that gives patches [B, T, D] and a summary [B, 1, D].

    Raises PlanError for a tap that the model does not have.
    """

    def __init__(self, model: Any, taps: dict[str, str], size: int) -> None:
        super().__init__()
        self.model = model
        self.taps = taps
        self.size = size
        config = model.config
        parameters = inspect.signature(model.forward).parameters
        # Code that comes with a model calls its images what it likes.
        self._by_name = "pixel_values" in parameters
        self._arguments: dict[str, Any] = {}
        if any(tap.startswith("hidden_states") for tap in taps.values()):
            self._arguments["output_hidden_states"] = True
        if "interpolate_pos_encoding" in parameters:
            self._arguments["interpolate_pos_encoding"] = size != getattr(config, "image_size", size)
        patch = getattr(config, "patch_size", None)
        patch_rows, patch_columns = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        self._grid = (size // patch_rows, size // patch_columns) if patch else None

    def forward(self, pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._by_name:
            found = mapping(self.model(pixel_values=pixels_B3SS, **self._arguments))
        else:
            found = mapping(self.model(pixels_B3SS, **self._arguments))
        outputs = {}
        for output, tap in self.taps.items():
            tokens_BTD = self._patches(found, tap) if output == "patches" else self._summary(found, tap)
            if tokens_BTD is not None:
                outputs[output] = tokens_BTD
        return outputs

    def grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of so many patches."""
        if self._grid and self._grid[0] * self._grid[1] == tokens:
            return self._grid
        return square_grid(tokens)

    def _patches(self, found: Any, tap: str) -> torch.Tensor:
        x = _pick(found, tap)
        # Between its blocks SAM keeps maps [B, rows, columns, D], unlike the [B, D, rows, columns] of its neck.
        channels_last = x.ndim == 4 and x.shape[1:3] == self._grid != x.shape[2:]
        tokens_BTD = as_patches(x, channels_last)
        patches = self._grid[0] * self._grid[1] if self._grid else tokens_BTD.shape[1]
        # More patches than tokens: the model merges patches as it goes, and all its tokens are spatial.
        return tokens_BTD[:, -patches:] if patches <= tokens_BTD.shape[1] else tokens_BTD

    def _summary(self, found: Any, taps: str) -> torch.Tensor | None:
        for tap in taps.split("|"):
            if tap == "cls" and "last_hidden_state" in found:
                tokens_BTD = as_patches(found["last_hidden_state"])
                patches = self._grid[0] * self._grid[1] if self._grid else tokens_BTD.shape[1]
                if tokens_BTD.shape[1] > patches:
                    return tokens_BTD[:, :1]
            elif (vector := found.get(tap)) is not None:
                summary_B1D: torch.Tensor = vector.flatten(1)[:, None]
                return summary_B1D
        if "|" in taps:
            return None
        if taps == "cls":
            raise PlanError(
                f"taps.summary: 'cls' cannot be had, this model has no CLS token; it has {', '.join(found)}"
            )
        raise PlanError(f"taps.summary: {taps!r} is not an output of this model; it has {', '.join(found)}, cls")


def _pick(found: Any, tap: str) -> torch.Tensor:
    layer = re.fullmatch(r"hidden_states\.(-?\d+)", tap)
    value = found.get("hidden_states" if layer else tap)
    if value is None or (isinstance(value, tuple) and not layer):
        raise PlanError(f"taps: {tap!r} is not an output of this model; it has {', '.join(found)}, hidden_states.N")
    if layer and not -len(value) <= int(layer[1]) < len(value):
        raise PlanError(f"taps: {tap!r} is outside of the model's {len(value)} hidden states")
    picked: torch.Tensor = value[int(layer[1])] if layer else value
    return picked
