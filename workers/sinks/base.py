"""What the phases share: a batch of images, and the account of every row.

Suffixes: B = images of a batch, C = rows of the dataset shard, S = side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from statsvc.layout import NON_FINITE, OK, STATUS_NAMES, UNDECODABLE, WRONG_SHAPE
from statsvc.ledger import Commit, Failure


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoded images in the order of the tar; images[i] is uint8 [B, S, S, 3] for the i-th teacher of the unit."""

    positions: np.ndarray
    keys: tuple[str, ...]
    half_B: np.ndarray
    images: tuple[np.ndarray, ...]


REASONS = {
    NON_FINITE: "a feature is NaN, infinite or beyond the range of the stored dtype",
    WRONG_SHAPE: "the teacher gave outputs of another shape",
}


class Account:
    """What became of every row for one teacher: nothing is dropped without a status and a reason."""

    def __init__(self, rows: int) -> None:
        self.status_C = np.zeros(rows, np.uint8)
        self.failed: list[Failure] = []
        self.batch_split = False  # for memory, or to find the image that came out in another shape

    def undecodable(self, failure: Failure) -> None:
        self.status_C[failure.position] = UNDECODABLE
        self.failed.append(failure)

    def take(self, batch: Batch, finite_B: np.ndarray, wrong_B: np.ndarray) -> np.ndarray:
        """bool [B]: the images whose features can be used; the others are entered with their reason."""
        status_B = np.where(wrong_B, WRONG_SHAPE, np.where(finite_B, OK, NON_FINITE)).astype(np.uint8)
        self.status_C[batch.positions] = status_B
        for j in np.flatnonzero(status_B != OK):
            self.failed.append(Failure(batch.keys[j], int(batch.positions[j]), REASONS[int(status_B[j])]))
        usable_B: np.ndarray = status_B == OK
        return usable_B

    def sorted_failures(self) -> tuple[Failure, ...]:
        """In the order of the tar."""
        return tuple(sorted(self.failed, key=lambda failure: failure.position))

    def counts(self) -> dict[str, int]:
        """How many rows have which status, without those that have none."""
        found = np.bincount(self.status_C, minlength=len(STATUS_NAMES))
        return {name: int(count) for name, count in zip(STATUS_NAMES, found, strict=True) if count}


class Sink(Protocol):
    """Where one teacher's features of one unit go."""

    account: Account

    def launch(self, batch: Batch, features: dict[str, torch.Tensor], wrong_B: np.ndarray) -> Any:
        """Queue the work on the device and return what `collect` needs; must not wait for the device."""

    def collect(self, launched: Any) -> None:
        """Take the results of an earlier `launch`."""

    def commit(self) -> Commit:
        """Publish the objects; the commit that names them is written by the caller, last."""

    def close(self) -> None:
        """Let go of everything; without `commit`, leave no trace."""


@dataclass(slots=True)
class SampleRows:
    """What is the same for all teachers: each sample's status and its box x, y, w, h, flip in the upright image."""

    status_C: np.ndarray
    views_C5: np.ndarray

    @classmethod
    def empty(cls, rows: int) -> SampleRows:
        return cls(np.zeros(rows, np.uint8), np.full((rows, 5), np.nan, np.float32))
