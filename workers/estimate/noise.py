"""How far what comes back of a dtype is from what was put in: in the normalized space and in the teacher's.

Suffixes: B = images, T = tokens, N = feature vectors, D = channels of a teacher, k = channels of a target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from statsvc.numerics.codec import Codec
from statsvc.numerics.transform import Transform
from workers.unit.device import finite_images

LEAST_DB = 10.0  # under it, more than a tenth of what a channel says is noise


@dataclass(frozen=True, slots=True)
class Noise:
    """Signal to noise ratios of a dtype in dB, pooled over tokens and channels; None where nothing is lost at all.

    channels  of the teacher's space, whose own ratio is under LEAST_DB
    tokens    that were compared; none: there is nothing to tell
    images    that were left out because the dtype cannot hold them
    """

    normalized: float | None
    teacher: float | None
    channels: int
    tokens: int
    images: int


class Comparison:
    """Features and targets against what comes back of them from one dtype."""

    def __init__(self, transform: Transform, codec: Codec, raw: bool, device: torch.device) -> None:
        self._transform, self._codec, self._raw, self._lost = transform, codec, raw, 0
        self._normalized = _Errors(torch.zeros(transform.rank, dtype=torch.float64, device=device))
        self._features = _Errors(torch.from_numpy(transform.mean).to(device))

    def add(self, x_BTD: torch.Tensor, counted_BT: torch.Tensor) -> None:
        transform, codec = self._transform, self._codec
        y_BTk = transform.apply(x_BTD)
        if self._raw:
            back_BTD = codec.decode(codec.encode(x_BTD), x_BTD.shape[-1])
            read_BTk = transform.apply(back_BTD)
        else:
            read_BTk = codec.decode(codec.encode(y_BTk), transform.rank)
            back_BTD = transform.invert(read_BTk)
        held_B = finite_images(read_BTk, back_BTD)
        self._lost += int((~held_B).sum())
        counted_BT = counted_BT & held_B[:, None]
        self._normalized.add(y_BTk[counted_BT], read_BTk[counted_BT])
        self._features.add(x_BTD[counted_BT], back_BTD[counted_BT])

    def noise(self) -> Noise:
        return Noise(
            self._normalized.decibels(),
            self._features.decibels(),
            self._features.noisy(LEAST_DB),
            self._features.count,
            self._lost,
        )


class _Errors:
    """Signal and noise of each channel, summed in float64 around a centre near the mean."""

    def __init__(self, centre_D: torch.Tensor) -> None:
        self._centre_D, self.count = centre_D, 0
        self._sum_D, self._square_D, self._noise_D = (torch.zeros_like(centre_D) for _ in range(3))

    def add(self, true_ND: torch.Tensor, read_ND: torch.Tensor) -> None:
        true_ND, read_ND = true_ND.double(), read_ND.double()
        self.count += len(true_ND)
        self._sum_D += (true_ND - self._centre_D).sum(0)
        self._square_D += (true_ND - self._centre_D).square().sum(0)
        self._noise_D += (read_ND - true_ND).square().sum(0)

    def _signal(self) -> torch.Tensor:
        """[D]: sum of squares around the mean."""
        return (self._square_D - self._sum_D.square() / max(self.count, 1)).clamp(min=0)

    def decibels(self) -> float | None:
        """Pooled over channels; None without noise."""
        signal, noise = float(self._signal().sum()), float(self._noise_D.sum())
        return 10 * math.log10(signal / noise) if noise and signal else None

    def noisy(self, decibels: float) -> int:
        """Channels whose own signal to noise ratio is under so many dB."""
        return int((self._signal() < 10 ** (decibels / 10) * self._noise_D).sum())
