"""What a user sees: bars with rate and ETA on a terminal, plain lines in a log; and tables as lines."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LOG_SECONDS = 10.0


def table(rows: Sequence[Sequence[str]], left: Collection[int]) -> Iterator[str]:
    """Rows of equally many cells as lines with aligned columns.

    left  the numbers of the columns that are aligned to the left; the others hold numbers, aligned to the right
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


class Bar(Protocol):
    """One phase that is going on."""

    def advance(self, images: int) -> None: ...


class Bars(Protocol):
    """One phase that goes on for several teachers."""

    def advance(self, teacher: str, images: int) -> None: ...


class Display:
    """Lines go to standard output; progress to a bar where standard output is a terminal, else to lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True, emoji=False)

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str = "images") -> Iterator[Bar]:
        """Show one phase of so many units; None where the end is not known."""
        with self._shown({name: total}, unit) as bars:
            yield bars[name]

    @contextmanager
    def phase_of_teachers(self, name: str, totals: Mapping[str, int], unit: str = "images") -> Iterator[Bars]:
        """The same with a line for each teacher: they may have different parts of the work behind them."""
        with self._shown({f"{name} {teacher}": total for teacher, total in totals.items()}, unit) as bars:
            yield _OfTeachers({teacher: bars[f"{name} {teacher}"] for teacher in totals})

    @contextmanager
    def _shown(self, totals: Mapping[str, int | None], unit: str) -> Iterator[Mapping[str, Bar]]:
        if self.console.is_terminal:
            wide = max(8, *map(len, totals))
            columns = (
                TextColumn(f"{{task.description:{wide}}}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                _Rate(), TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.console) as progress:
                yield {n: _Terminal(progress, progress.add_task(n, total=total)) for n, total in totals.items()}
        else:
            lines = {n: _Lines(self, n, total, unit) for n, total in totals.items()}
            yield lines
            for line in lines.values():
                line.report(ended=True)


@dataclass(frozen=True)
class _OfTeachers:
    bars: Mapping[str, Bar]

    def advance(self, teacher: str, images: int) -> None:
        self.bars[teacher].advance(images)


class _Terminal:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, images: int) -> None:
        self._progress.advance(self._task, images)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class _Lines:
    def __init__(self, display: Display, name: str, total: int | None, unit: str) -> None:
        self._display, self._name, self._total, self._unit = display, name, total, unit
        self._begun = self._reported = time.monotonic()
        self._done = 0

    def advance(self, images: int) -> None:
        self._done += images
        if time.monotonic() - self._reported >= LOG_SECONDS:
            self.report()

    def report(self, ended: bool = False) -> None:
        self._reported = time.monotonic()
        seconds = self._reported - self._begun
        rate = self._done / seconds if seconds else 0.0
        text = f"{self._name}: {self._done}" + (f" of {self._total}" if self._total is not None else "")
        text += f" {self._unit}, {rate:.1f}/s"
        if self._total is not None and rate > 0 and self._done < self._total and not ended:
            text += f", {(self._total - self._done) / rate:.0f} s left"
        self._display.line(text)
