"""The table of a fault test: what was injected, what survived it, and what was lost."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.report import replace_block
from tests.faults.site import Site
from tests.faults.survival import count_rows, differing
from tests.support.contents import contents

HEADER = ("fault", "injected", "survived", "rows lost", "rows duplicated", "compared")


@dataclass
class Line:
    """One kind of fault. `survived` counts the injected ones after which all that was compared was right."""

    kind: str
    injected: int = 0
    survived: int = 0
    lost: int = 0
    duplicated: int = 0
    compared: str = ""
    not_run: str = ""

    def settle(
        self, site: Site, like: Site, injected: int = 1, unusable: Collection[str] = (), compared: str = "every object"
    ) -> None:
        """The end of every case: each row once, every byte as in the undisturbed store `like`, `verify` clean."""
        self.injected += injected
        rows = count_rows(site.store, site.tars, like.store, unusable)
        self.lost += rows.lost
        self.duplicated += rows.duplicated
        assert rows == (0, 0), f"{self.kind}: {rows}"
        different = differing(site.store, contents(like.store))
        assert not different, f"{self.kind}: {len(different)} objects differ: {', '.join(different[:8])}"
        self.verify(site)
        self.passed(injected, f"{compared} with an undisturbed run")

    def verify(self, site: Site) -> None:
        verified = site.command("verify")
        assert verified.code == 0, verified.printed + verified.errors

    def passed(self, injected: int, compared: str) -> None:
        """So many were survived; what was compared is said once."""
        self.survived += injected
        if compared not in self.compared:
            self.compared = "; ".join(filter(None, (self.compared, compared)))

    def cells(self) -> tuple[str, ...]:
        if self.not_run and not self.injected:
            return self.kind, "0", "", "", "", f"not run: {self.not_run}"
        numbers = (self.injected, self.survived, self.lost, self.duplicated)
        return self.kind, *map(str, numbers), self.compared


def total(lines: list[Line]) -> tuple[str, ...]:
    sums = (sum(getattr(line, name) for line in lines) for name in ("injected", "survived", "lost", "duplicated"))
    return "all", *map(str, sums), ""


def terminal(lines: list[Line]) -> list[str]:
    grid = [HEADER, *(line.cells() for line in lines), total(lines)]
    widths = [max(len(row[column]) for row in grid) for column in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid]


def markdown(lines: list[Line]) -> str:
    grid = [HEADER, tuple("---" for _ in HEADER), *(line.cells() for line in lines), total(lines)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in grid)


def write(lines: list[Line], record: Path | None, readme: Path | None) -> None:
    """The lines as JSON, and as a table between `<!-- faults:begin -->` and `<!-- faults:end -->` of a README."""
    if record:
        record.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    if readme:
        readme.write_text(replace_block(readme.read_text(), markdown(lines), "faults"))
