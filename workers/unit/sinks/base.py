"""What the phases share: a batch of views, and the account of every row.

Suffixes: B = views of a batch, C = rows of the dataset shard, S = side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, SupportsIndex

import numpy as np
import torch

from statsvc.dataset.decode import Decoded
from statsvc.numerics.views import View
from statsvc.store.commits import Commit, Failure
from statsvc.store.layout import BEYOND_RANGE, NON_FINITE, OK, STATUS_NAMES, UNDECODABLE, WRONG_SHAPE


@dataclass(frozen=True, slots=True)
class Batch:
    """Views of images in the order of the tar; images[i] is uint8 [B, S, S, 3] for the i-th teacher of the unit.

    rows        of the dataset shard: position x views of each image + number of the view
    hashes_B16  of the keys
    """

    rows: np.ndarray
    keys: tuple[str, ...]
    hashes_B16: np.ndarray
    views: tuple[View, ...]
    images: tuple[np.ndarray, ...]
    per_image: int

    @classmethod
    def stack(
        cls, decoded: Sequence[Decoded], *, rows: Sequence[int], keys: Sequence[str], hashes: Sequence[bytes],
        per_image: int,
    ) -> Self:  # fmt: skip
        """Decoded views as one batch, with the row of each, and the key of its image and its hash."""
        return cls(
            rows=np.array(rows),
            keys=tuple(keys),
            hashes_B16=np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16),
            views=tuple(found.view for found in decoded),
            images=tuple(np.stack(arrays) for arrays in zip(*(d.arrays_HW3 for d in decoded), strict=True)),
            per_image=per_image,
        )

    @property
    def numbers(self) -> np.ndarray:
        """[B] which of its image's views each one is."""
        numbers_B: np.ndarray = self.rows % self.per_image
        return numbers_B

    def failure(self, j: SupportsIndex, reason: str) -> Failure:
        """What became of view j, which is named where there are several."""
        position, number = divmod(int(self.rows[j]), self.per_image)
        return Failure(self.keys[j], position, f"view {number}: {reason}" if self.per_image > 1 else reason)

    @property
    def halves(self) -> np.ndarray:
        """[B] 0 or 1: the half of the images that each one belongs to, with all its views."""
        halves_B: np.ndarray = self.hashes_B16[:, 0] & 1
        return halves_B


@dataclass(frozen=True, slots=True)
class Features:
    """What a teacher gave for a batch.

    outputs     float32 [B, T, D] on the device
    wrong_B     bool: views for which it gave another shape; theirs are NaN here
    covered_BT  bool: patches that lie wholly inside the image; None: all of them
    split       whether the batch had to be split
    """

    outputs: dict[str, torch.Tensor]
    wrong_B: np.ndarray
    covered_BT: np.ndarray | None = None
    split: bool = False


REASONS = {
    NON_FINITE: "a feature is NaN or infinite",
    WRONG_SHAPE: "the teacher gave outputs of another shape",
}


class Account:
    """What became of every row for one teacher: nothing is dropped without a status and a reason."""

    def __init__(self, rows: int) -> None:
        self.status_C = np.zeros(rows, np.uint8)
        self.failed: list[tuple[int, Failure]] = []  # with the row, or the first of those of an image
        self.beyond_range = 0
        self.batch_split = False  # for memory, or to find the image that came out in another shape

    def undecodable(self, rows: slice, failure: Failure) -> None:
        """One failure for all rows of an image."""
        self.status_C[rows] = UNDECODABLE
        self.failed.append((rows.start, failure))

    def take(
        self,
        batch: Batch,
        features: Features,
        finite_B: np.ndarray,
        held_B: np.ndarray | None = None,
        dtype: str = "",
    ) -> np.ndarray:
        """bool [B]: the views whose features can be used; the others are entered with their reason.

        held_B  views that the dtype of a cache set can hold. The teacher's status does not depend on it: other cache
                sets may hold what this one cannot
        """
        self.batch_split |= features.split
        status_B = np.where(features.wrong_B, WRONG_SHAPE, np.where(finite_B, OK, NON_FINITE)).astype(np.uint8)
        self.status_C[batch.rows] = status_B
        for j in np.flatnonzero(status_B != OK):
            self.failed.append((int(batch.rows[j]), batch.failure(j, REASONS[int(status_B[j])])))
        usable_B: np.ndarray = status_B == OK
        if held_B is None:
            return usable_B
        for j in np.flatnonzero(usable_B & ~held_B):
            reason = f"a number is beyond the range of {dtype}; a cache set of float32 holds it"
            self.failed.append((int(batch.rows[j]), batch.failure(j, reason)))
            self.beyond_range += 1
        return np.asarray(usable_B & held_B)

    def sorted_failures(self) -> tuple[Failure, ...]:
        """In the order of the rows."""
        return tuple(failure for _, failure in sorted(self.failed, key=lambda failed: failed[0]))

    def counts(self) -> dict[str, int]:
        """How many rows have which status, without those that have none; ok are those that can be used."""
        found = np.bincount(self.status_C, minlength=len(STATUS_NAMES))
        counts = {name: int(count) for name, count in zip(STATUS_NAMES, found, strict=True)}
        counts["ok"] -= self.beyond_range
        return {name: count for name, count in {**counts, BEYOND_RANGE: self.beyond_range}.items() if count}


class Sink(Protocol):
    """Where one teacher's features of one unit go."""

    teacher: str
    account: Account

    def launch(self, batch: Batch, features: Features) -> Any:
        """Queue the work on the device and return what `collect` needs; must not wait for the device."""

    def collect(self, launched: Any) -> None:
        """Take the results of an earlier `launch`."""

    def commit(self) -> Commit:
        """Publish the objects; the commit that names them is written by the caller, last."""

    def close(self) -> None:
        """Let go of everything; without `commit`, leave no trace."""


@dataclass(slots=True)
class SampleRows:
    """What is the same for all teachers: the status of each row, and its view: x, y, w, h, flip."""

    status_C: np.ndarray
    views_C5: np.ndarray

    @classmethod
    def empty(cls, rows: int) -> SampleRows:
        return cls(np.zeros(rows, np.uint8), np.full((rows, 5), np.nan, np.float32))
