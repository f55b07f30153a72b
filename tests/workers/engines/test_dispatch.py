"""What becomes of units, whatever their workers answer and in whatever order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.errors import StoreError
from workers.engines.base import ATTEMPTS
from workers.engines.dispatch import Work
from workers.unit.job import Unit
from workers.unit.worker import Done, Failed

AGAIN, SHARD = Failed("again", "the worker died", ""), Failed("shard", "not a tar", "", reusable=True)
ANSWERS: dict[str, Done | Failed] = {"done": Done(), "again": AGAIN, "shard": SHARD}


def units(count: int) -> list[Unit]:
    return [Unit("measure", n, f"{n}.tar", f"{n}.tar", (), ("jpg",), 8, 4) for n in range(count)]


@given(
    outcomes=st.lists(st.lists(st.sampled_from(["done", "again", "shard"]), min_size=ATTEMPTS, max_size=ATTEMPTS)),
    data=st.data(),
)
def test_every_unit_ends_once_after_as_many_attempts_as_its_answers_allow(
    outcomes: list[list[str]], data: st.DataObject
) -> None:
    shown, tries, results = Counter[str](), Counter[str](), dict[str, str | None]()

    def on_images(unit: Unit, images: int) -> None:
        shown[unit.name] += images
        assert shown[unit.name] >= 0

    work, busy = Work(units(len(outcomes)), on_images), list[Unit]()
    while True:
        while len(busy) < 3 and (unit := work.take()) is not None:
            busy.append(unit)
        if not busy:
            break
        unit = busy.pop(data.draw(st.integers(0, len(busy) - 1)))
        outcome = outcomes[unit.shard][tries[unit.name]]
        tries[unit.name] += 1
        for images in sorted(data.draw(st.lists(st.integers(0, 8), max_size=3))):
            work.report(unit, images)
            assert shown[unit.name] == images
        if outcome == "done":
            work.report(unit, 8)
        result = work.settle(unit, ANSWERS[outcome])
        if result is not None:
            assert unit.name not in results
            results[unit.name] = result.problem
    assert not work.is_waiting()
    for unit, answers in zip(units(len(outcomes)), outcomes, strict=True):
        ends = [n for n, answer in enumerate(answers) if answer != "again"]
        last = answers[ends[0]] if ends else "again"
        assert tries[unit.name] == (ends[0] + 1 if ends else ATTEMPTS)
        assert results[unit.name] == {"done": None, "again": AGAIN.message, "shard": SHARD.message}[last]
        assert shown[unit.name] == (8 if last == "done" else 0)


def test_failed_units_are_taken_before_new_ones() -> None:
    first, second = units(2)
    work = Work([first, second], lambda *_: None)
    assert work.take() is first
    assert work.settle(first, AGAIN) is None
    assert [work.take(), work.take(), work.take()] == [first, second, None]


def test_looking_for_work_takes_none_of_it() -> None:
    work, asked = Work(iter(units(1)), lambda *_: None), units(1)
    assert work.is_waiting()
    assert work.is_waiting()
    assert [work.take(), work.take()] == [*asked, None]
    assert not work.is_waiting()


def test_a_broken_store_ends_the_phase_and_takes_the_images_back() -> None:
    shown = list[int]()
    (unit,) = units(1)
    work = Work([unit], lambda _, images: shown.append(images))
    work.report(unit, 5)
    with pytest.raises(StoreError, match="the disk is full"):
        work.settle(unit, Failed("store", "the disk is full", ""))
    assert shown == [5, -5]
