"""The order of an epoch: laws that hold for any counts of dataset shards, ranks, workers and batches.

Suffixes: S = dataset shards, N = rows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.errors import PlanError
from statsvc.student.data.epoch_order import Order

Row = tuple[int, int]


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Of rank 0; some dataset shards may be empty."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    settings: dict[str, Any] = {
        "batch_size": draw(st.integers(1, 30)),
        "window": draw(st.integers(1, 120)),
        "seed": draw(st.integers(0, 2**40)),
        "shuffle": draw(st.booleans()),
        "world_size": draw(st.integers(1, 9)),
    }
    tails = ["pad"] if sum(counts) < settings["world_size"] * settings["batch_size"] else ["pad", "drop"]
    return Order(np.array(counts), **settings, tail=draw(st.sampled_from(tails)))


def of_rank(order: Order, rank: int, epoch: int) -> list[list[tuple[Row, bool]]]:
    """Its batches: each row and whether it is a repeat."""
    ranked = dataclasses.replace(order, rank=rank)
    batches = []
    for step in range(ranked.batches):
        picked = ranked.epoch(epoch).batch(step)
        rows = zip(picked.shard_N.tolist(), picked.row_N.tolist(), strict=True)
        batches.append(list(zip(rows, picked.padding_N.tolist(), strict=True)))
    return batches


@given(orders(), st.integers(0, 5))
def test_each_row_comes_once_over_all_ranks_and_repeats_are_marked(order: Order, epoch: int) -> None:
    everything = {(s, row) for s, count in enumerate(order.count_S.tolist()) for row in range(count)}
    taken = [entry for rank in range(order.world_size) for batch in of_rank(order, rank, epoch) for entry in batch]
    once = Counter(row for row, padding in taken if not padding)
    assert set(once.values()) == {1}
    repeats = [row for row, padding in taken if padding]
    assert set(repeats) <= everything
    if order.tail == "pad":
        assert set(once) == everything
        assert len(repeats) < order.world_size
    else:
        assert set(once) <= everything
        assert not repeats
        assert len(everything) - len(once) < order.world_size * order.batch_size


@given(orders(), st.integers(0, 5))
def test_all_ranks_have_batches_of_the_same_number_and_sizes(order: Order, epoch: int) -> None:
    sizes = [[len(batch) for batch in of_rank(order, rank, epoch)] for rank in range(order.world_size)]
    assert all(each == sizes[0] for each in sizes)
    assert len(sizes[0]) == order.batches
    assert all(size == order.batch_size for size in (sizes[0] if order.tail == "drop" else sizes[0][:-1]))


@given(orders(), st.integers(0, 5), st.integers(1, 6), st.integers(0, 60))
def test_workers_that_take_every_nth_batch_give_the_same_batches(
    order: Order, epoch: int, workers: int, stop: int
) -> None:
    # A DataLoader asks its workers in turn, so this is what it gives, broken off and gone on with other workers.
    whole = of_rank(order, 0, epoch)
    parts = [iter(whole[worker::workers]) for worker in range(workers)]
    turns = [next(parts[turn % workers], None) for turn in range(len(whole) + workers)]
    before = list(islice((batch for batch in turns if batch is not None), stop))
    again = order.epoch(epoch)
    after = [again.batch(step).row_N.tolist() for step in range(len(before), order.batches)]
    assert [[row for (_, row), _ in batch] for batch in before] + after == [
        [row for (_, row), _ in batch] for batch in whole
    ]


@given(orders(), st.integers(0, 5))
def test_rows_of_a_batch_ascend_and_a_window_holds_whole_pieces(order: Order, epoch: int) -> None:
    for batch in of_rank(order, 0, epoch):
        rows = [row for row, _ in batch]
        assert rows == sorted(rows)
    taken = order.epoch(epoch)
    seen: list[int] = []
    for number in range(len(taken.windows)):
        seen += taken.shards_of(number).tolist()
    assert len(seen) == len(set(seen))  # so each dataset shard is opened once in an epoch


@given(orders())
def test_without_shuffling_the_rows_come_as_they_are_stored(order: Order) -> None:
    plain = dataclasses.replace(order, shuffle=False)
    taken = [
        row for rank in range(plain.world_size) for batch in of_rank(plain, rank, 3) for row, pad in batch if not pad
    ]
    assert taken == sorted(taken)


def test_epochs_and_seeds_differ_and_are_the_same_again() -> None:
    def all_rows(seed: int, epoch: int) -> list[int]:
        taken = Order(np.array([50, 50, 50, 50]), batch_size=200, window=60, seed=seed).epoch(epoch)
        rows: list[int] = []
        for number in range(len(taken.windows)):
            shard_N, row_N = taken.window(number)
            rows += (50 * shard_N + row_N).tolist()
        return rows

    assert all_rows(0, 0) == all_rows(0, 0)
    assert len({tuple(all_rows(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_is_what_it_has_always_been() -> None:
    # A checkpoint of an older version must go on with the very next batch.
    taken = Order(np.array([4, 3, 5]), batch_size=4, window=5, seed=4).epoch(1)
    found = [list(zip(*map(np.ndarray.tolist, taken.batch(step)[:2]), strict=True)) for step in range(3)]
    assert found == FIXED


def test_a_shuffle_moves_rows_about_as_far_as_chance_would() -> None:
    # One window over everything: the mean distance of a row from its old place is n / 3 for a uniform permutation, with
    # a standard deviation of about n / (sqrt(n) * 3.4).
    n = 10_000
    shuffled_N = Order(np.array([n]), batch_size=n, window=n).permutation(n, "anything")
    distance = np.abs(shuffled_N - np.arange(n)).mean()
    assert abs(distance - n / 3) < 5 * n / (np.sqrt(n) * 3.4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"world_size": 2, "rank": 2}, "rank must be 0 to world_size - 1 = 1, not 2"),
        ({"tail": "wrap"}, "tail 'wrap' is neither 'pad' nor 'drop'"),
        ({"tail": "drop", "batch_size": 5, "world_size": 3}, r"10 rows; tail='drop' needs at least 3 ranks x 5 rows"),
    ],
)
def test_settings_that_give_no_batches_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Order(np.array([10]), **{"batch_size": 2, "window": 4, **settings})


FIXED = [[(0, 0), (0, 1), (0, 2), (2, 0)], [(0, 3), (2, 2), (2, 3), (2, 4)], [(1, 0), (1, 1), (1, 2), (2, 1)]]
