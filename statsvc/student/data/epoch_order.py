"""In which order an epoch takes the rows: dataset shards at random, then rows at random within a window of them.

    all rows, dataset shard after dataset shard, in this epoch's order
    |------- rank 0 -------|------- rank 1 -------|------- rank 2 -------|     equal parts, each cut into windows
    | window 0 | window 1 ..                                                   whole pieces of dataset shards, shuffled
    | batch 0 | batch 1 | batch 2 | ...                                        worker w of W takes w, w + W, ...

So batch i of a rank is the same whatever the number of workers, and costs nothing to go on from: no state but i.

Suffixes: S = dataset shards, P = pieces of them in the part of a rank, N = rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statsvc.errors import PlanError

Tail = Literal["pad", "drop"]
Integers = NDArray[np.int64]


class Picked(NamedTuple):
    """Rows of a batch: the place of each one's dataset shard, its own among that one's rows, whether it is a repeat."""

    shard_N: Integers
    row_N: Integers
    padding_N: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Order:
    """What decides the order of all epochs.

    count_S     rows of each dataset shard
    window      rows that are shuffled together, at least; whole pieces of dataset shards, so that each is read once
    tail        pad: ranks are made equal by repeating fewer rows than there are ranks, and the last batch may be short;
                drop: full batches only, and what is left over sits this epoch out
    """

    count_S: Integers
    batch_size: int
    window: int
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    tail: Tail = "pad"

    def __post_init__(self) -> None:
        """Raises PlanError."""
        for name in ("batch_size", "window", "world_size"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise PlanError(f"rank must be 0 to world_size - 1 = {self.world_size - 1}, not {self.rank}")
        if self.tail not in ("pad", "drop"):
            raise PlanError(f"tail {self.tail!r} is neither 'pad' nor 'drop'")
        if not self.per_rank:
            least = "one row" if self.tail == "pad" else f"{self.world_size} ranks x {self.batch_size} rows"
            raise PlanError(f"there are {self.rows} rows; tail={self.tail!r} needs at least {least}")

    @property
    def rows(self) -> int:
        """Of all ranks, each once."""
        return int(self.count_S.sum())

    @property
    def per_rank(self) -> int:
        """Rows of each rank, repeats included."""
        if self.tail == "pad":
            return -(-self.rows // self.world_size)
        return self.rows // (self.world_size * self.batch_size) * self.batch_size

    @property
    def batches(self) -> int:
        """Of each rank."""
        return -(-self.per_rank // self.batch_size)

    def epoch(self, epoch: int) -> EpochOrder:
        return EpochOrder(self, epoch)

    def permutation(self, count: int, *of: object) -> Integers:
        """0 to count - 1; at random, a function of the seed and `of` alone, or as they are without shuffling.

        By the raw words of a Philox generator: numpy promises that they never change, which it does not of its
        shuffles, and an epoch may be resumed after an upgrade.
        """
        if not self.shuffle:
            return np.arange(count)
        key = hashlib.blake2b(repr((self.seed, *of)).encode(), digest_size=16).digest()
        words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
        return np.argsort(words, kind="stable")


class EpochOrder:
    """The batches of one rank in one epoch."""

    def __init__(self, order: Order, epoch: int) -> None:
        self._order, self._epoch = order, epoch
        self.batches = order.batches
        self._shard_S = order.permutation(len(order.count_S), "shards", epoch)
        self._end_S = np.cumsum(order.count_S[self._shard_S])
        self._first, last = order.rank * order.per_rank, (order.rank + 1) * order.per_rank
        self._whole = max(0, min(last, order.rows) - self._first)  # rows that are no repeats
        self.window = lru_cache(2)(self._window)  # a batch lies in one, or in two that follow each other

    def batch(self, step: int) -> Picked:
        """Its rows, in ascending order: what belongs together in a file is read together."""
        begin = step * self._order.batch_size
        end = min(begin + self._order.batch_size, self._order.per_rank)
        parts = [self._repeats(max(begin, self._whole), end)]
        end = min(end, self._whole)
        number = self.window_of(step)
        while begin < end:
            shard_N, row_N = self.window(number)
            there = slice(begin - int(self.windows[number]), end - int(self.windows[number]))
            parts.append((shard_N[there], row_N[there]))
            begin += len(parts[-1][0])
            number += 1
        shard_N, row_N = (np.concatenate([part[axis] for part in parts]) for axis in (0, 1))
        padding_N = np.arange(len(shard_N)) < len(parts[0][0])
        ascending_N = np.lexsort((padding_N, row_N, shard_N))
        return Picked(shard_N[ascending_N], row_N[ascending_N], padding_N[ascending_N])

    def shards_of(self, number: int) -> Integers:
        """The dataset shards of a window, in the order of the epoch; none where there is no such window."""
        if not 0 <= number < len(self.windows):
            return np.zeros(0, np.int64)
        shard_N, _ = self.window(number)
        found, first = np.unique(shard_N, return_index=True)
        return found[np.argsort(first)]

    def window_of(self, step: int) -> int:
        """The window in which a batch begins."""
        return int(np.searchsorted(self.windows, step * self._order.batch_size, "right")) - 1

    @cached_property
    def windows(self) -> Integers:
        """Where each window begins among the rows of the rank."""
        begin_P = self._pieces[0]
        return begin_P[np.unique(begin_P // self._order.window, return_index=True)[1]]

    @cached_property
    def _pieces(self) -> tuple[Integers, Integers, Integers, Integers]:
        """Where each piece begins in the rank's part; its place in the epoch; its first row there and the one after."""
        first, last = self._first, self._first + self._whole
        if not self._whole:
            return (np.zeros(0, np.int64),) * 4
        place_P = np.arange(
            np.searchsorted(self._end_S, first, "right"), np.searchsorted(self._end_S, last, "left") + 1
        )
        begin_P = self._end_S[place_P] - self._order.count_S[self._shard_S[place_P]]
        row_P, end_P = np.maximum(first - begin_P, 0), np.minimum(last, self._end_S[place_P]) - begin_P
        some_P = end_P > row_P  # a dataset shard may be empty
        return ((begin_P + row_P - first)[some_P], place_P[some_P], row_P[some_P], end_P[some_P])

    def _window(self, number: int) -> tuple[Integers, Integers]:
        """Dataset shard and row of everything in a window, shuffled."""
        begin_P, place_P, row_P, end_P = self._pieces
        in_P = begin_P // self._order.window == self.windows[number] // self._order.window
        pieces = list(zip(self._shard_S[place_P[in_P]].tolist(), row_P[in_P], end_P[in_P], strict=True))
        shard_N = np.repeat([shard for shard, *_ in pieces], [end - row for _, row, end in pieces])
        row_N = np.concatenate([self._rows(shard)[row:end] for shard, row, end in pieces])
        shuffled_N = self._order.permutation(len(row_N), "window", self._epoch, self._order.rank, number)
        return shard_N[shuffled_N], row_N[shuffled_N]

    def _rows(self, shard: int) -> Integers:
        """The rows of a dataset shard in the order in which ranks share them."""
        return self._order.permutation(int(self._order.count_S[shard]), "rows", self._epoch, shard)

    def _repeats(self, begin: int, end: int) -> tuple[Integers, Integers]:
        """Dataset shard and row of what the rank repeats from the beginning of the epoch."""
        global_N = (self._first + np.arange(begin, max(begin, end))) % self._order.rows
        place_N = np.searchsorted(self._end_S, global_N, "right")
        shard_N = self._shard_S[place_N]
        offset_N = global_N - (self._end_S[place_N] - self._order.count_S[shard_N])
        rows = [self._rows(shard)[offset] for shard, offset in zip(shard_N.tolist(), offset_N.tolist(), strict=True)]
        return shard_N, np.array(rows, np.int64)
