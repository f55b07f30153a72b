"""What a user sees while a run goes on: bars with rate and ETA on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LOG_SECONDS = 10.0


class Bar(Protocol):
    """One phase that is going on."""

    def advance(self, images: int) -> None: ...


class Display:
    """Lines go to standard output; progress to a bar where standard output is a terminal, else to lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True, emoji=False)

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str = "images") -> Iterator[Bar]:
        """Show one phase of so many units; None where the end is not known."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), _Rate(),
                TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.console) as progress:
                yield _Terminal(progress, progress.add_task(name, total=total))
        else:
            lines = _Lines(self, name, total, unit)
            yield lines
            lines.report()


class _Terminal:
    def __init__(self, progress: Progress, task: object) -> None:
        self._progress, self._task = progress, task

    def advance(self, images: int) -> None:
        self._progress.advance(self._task, images)  # type: ignore[arg-type]


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

    def report(self) -> None:
        self._reported = time.monotonic()
        seconds = self._reported - self._begun
        rate = self._done / seconds if seconds else 0.0
        text = f"{self._name}: {self._done}" + (f" of {self._total}" if self._total is not None else "")
        text += f" {self._unit}, {rate:.1f}/s"
        if self._total is not None and rate > 0 and self._done < self._total:
            text += f", {(self._total - self._done) / rate:.0f} s left"
        self._display.line(text)
