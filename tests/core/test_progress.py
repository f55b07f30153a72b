"""What a user sees while a run goes on, for every teacher: how far, how fast, how long still."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import statsvc.progress
from statsvc.progress import LOG_SECONDS, Display, table


class Clock:
    """A time that only we let go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(statsvc.progress, "time", clock)
    return clock


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def display(output: io.StringIO) -> Display:
    return Display(Console(file=output, highlight=False, soft_wrap=True))


def test_log_has_a_line_with_rate_and_time_left_per_teacher(
    clock: Clock, output: io.StringIO, display: Display
) -> None:
    with display.phase_of_teachers("cache", {"dino": 400, "siglip": 100}) as bars:
        clock.now += LOG_SECONDS
        bars.advance("dino", 200)
        bars.advance("siglip", 100)
        assert output.getvalue().splitlines() == [
            "cache dino: 200 of 400 images, 20.0/s, 10 s left",
            "cache siglip: 100 of 100 images, 10.0/s",
        ]
        clock.now += LOG_SECONDS
        bars.advance("dino", 200)
    assert output.getvalue().splitlines()[-2:] == [
        "cache dino: 400 of 400 images, 20.0/s",
        "cache siglip: 100 of 100 images, 5.0/s",
    ]


def test_images_lost_with_a_worker_are_taken_back(clock: Clock, output: io.StringIO, display: Display) -> None:
    with display.phase_of_teachers("measure", {"dino": 30}) as bars:
        bars.advance("dino", 20)
        bars.advance("dino", -20)
        clock.now += LOG_SECONDS
        bars.advance("dino", 10)
        assert output.getvalue() == "measure dino: 10 of 30 images, 1.0/s, 20 s left\n"


def test_finished_phase_has_no_time_left(clock: Clock, output: io.StringIO, display: Display) -> None:
    with display.phase_of_teachers("measure", {"dino": 30}) as bars:
        clock.now += 1
        bars.advance("dino", 10)
    assert output.getvalue() == "measure dino: 10 of 30 images, 10.0/s\n"


def test_terminal_has_a_bar_for_each_teacher() -> None:
    output = io.StringIO()
    display = Display(Console(file=output, force_terminal=True, width=120))
    with display.phase_of_teachers("cache", {"dino": 4, "siglip": 8}, "views") as bars:
        bars.advance("dino", 4)
        bars.advance("siglip", 2)
    shown = output.getvalue()
    assert "cache dino" in shown
    assert "4/4" in shown
    assert "cache siglip" in shown
    assert "2/8" in shown


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    rows = [("teacher", "MSE"), ("a", "12.5"), ("longest-name", "3")]
    assert list(table(rows, left=(0,))) == ["teacher        MSE", "a             12.5", "longest-name     3"]
    assert list(table(rows, left=(0, 1))) == ["teacher       MSE", "a             12.5", "longest-name  3"]
