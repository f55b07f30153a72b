"""What benchmarks find, in one structure: sections of tables of rows, each a figure beside a limit or a peer.

A row says what was measured, our figure, the one it is compared with, their ratio (above 1: ours is better) and the
goal. Nothing here knows the date or the machine's name: the same figures give the same record.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

PACKAGES = ("statsvc", "numpy", "torch", "zarr", "tensorstore", "safetensors", "scikit-learn", "transformers")


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on the ratio, or on our own figure."""

    value: float
    at_most: bool = False
    of: Literal["ratio", "ours"] = "ratio"

    def text(self, unit: str) -> str:
        bound = "at most" if self.at_most else "at least"
        if self.of == "ours":
            return f"{bound} {number(self.value)} {unit}".rstrip()
        return f"{bound} {number(self.value)}x"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ours is None where it, or the other, was not measured; then `note` says why."""

    what: str
    ours: float | None
    unit: str = ""
    other: float | None = None
    against: str = ""  # the peer or the limit
    better: Literal["more", "less", "decibels"] = "more"
    goal: Goal | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better than the other; for decibels, how many more."""
        if self.ours is None or self.other is None:
            return None
        if self.better == "decibels":
            return self.ours - self.other
        above, below = (self.ours, self.other) if self.better == "more" else (self.other, self.ours)
        return above / below if below else None

    @property
    def met(self) -> bool | None:
        """None without a goal or without the figure that it is about."""
        figure = None if self.goal is None else self.ours if self.goal.of == "ours" else self.ratio
        if self.goal is None or figure is None:
            return None
        return figure <= self.goal.value if self.goal.at_most else figure >= self.goal.value

    def cells(self) -> list[str]:
        ours = "" if self.ours is None else f"{number(self.ours)} {self.unit}".rstrip()
        other = self.note or ("" if self.other is None else f"{number(self.other)} {self.unit}".rstrip())
        against = f"{self.against}: {other}" if self.against and other else self.against or other
        ratio = ""
        if self.ratio is not None:
            ratio = f"{self.ratio:+.1f} dB" if self.better == "decibels" else f"{number(self.ratio)}x"
        goal = "" if self.goal is None else self.goal.text(self.unit)
        if self.met is not None:
            goal += ": met" if self.met else ": **missed**"
        return [self.what, ours, against, ratio, goal]


HEADER = ["what", "ours", "limit or peer", "ratio", "goal"]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that belong together; or, with a header of its own, lines of plain cells."""

    title: str
    rows: tuple[Row, ...] = ()
    note: str = ""
    header: tuple[str, ...] = ()
    lines: tuple[tuple[str, ...], ...] = ()

    def grid(self) -> list[list[str]]:
        """Header and lines, as text; columns that no line fills are left out."""
        grid = [list(self.header), *map(list, self.lines)] if self.header else []
        grid = grid or [HEADER, *(row.cells() for row in self.rows)]
        filled = [column for column in range(len(grid[0])) if any(line[column] for line in grid[1:])]
        return [[line[column] for column in filled] for line in grid]

    def missed(self) -> list[str]:
        missed = (row for row in self.rows if row.met is False)
        return [f"{self.title}: {row.what}{row.against and ', against '}{row.against}" for row in missed]

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"title": self.title, "note": self.note}
        if self.header:
            return found | {"header": self.header, "lines": self.lines}
        return found | {"rows": [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in self.rows]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Table:
        rows = []
        for row in found.get("rows", ()):
            goal = row["goal"] and Goal(**row["goal"])
            rows.append(Row(**{name: row[name] for name in Row.__slots__ if name != "goal"}, goal=goal))
        lines = tuple(map(tuple, found.get("lines", ())))
        return cls(found["title"], tuple(rows), found["note"], tuple(found.get("header", ())), lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if not value or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def environment(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Device, cores and versions: what figures depend on."""
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "device": "CPU",
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(packages),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
