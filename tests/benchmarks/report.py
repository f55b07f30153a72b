"""Tables on the terminal, as a JSON record, and as Markdown between two markers of a README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import Table

Sections = dict[str, list[Table]]


def terminal(table: Table) -> str:
    grid = table.grid()
    widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in grid]
    return "\n".join(
        ["", table.title, *(f"  {line}".rstrip() for line in lines), *([table.note] if table.note else [])]
    )


def record(environment: dict[str, Any], sections: Sections) -> str:
    tables = {name: [table.as_json() for table in each] for name, each in sections.items()}
    return json.dumps({"environment": environment, "sections": tables}, indent=1, allow_nan=False) + "\n"


def read_record(text: str) -> tuple[dict[str, Any], Sections]:
    found = json.loads(text)
    sections = {name: [Table.from_json(table) for table in each] for name, each in found["sections"].items()}
    return found["environment"], sections


RATIOS = "What stands in one table was measured in one run; ratios above 1 mean that ours is better."


def markdown(environment: dict[str, Any], sections: Sections, begin: str = RATIOS) -> str:
    """The block that goes between the markers, with `begin` at its head."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    about = f"{environment['cores']} cores of {environment['cpu']}, Python {environment['python']}, {versions}"
    if environment["device"] != "CPU":
        about = f"{environment['device']}, {about}"
    parts = [f"{begin} {about}."]
    for table in (table for each in sections.values() for table in each):
        head, *lines = ([_cell(cell) for cell in line] for line in table.grid())
        rows = [head, ["---"] * len(head), *lines]
        parts += [f"**{table.title}**", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts)


def replace_block(text: str, block: str, name: str = "bench") -> str:
    """The text with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced, and nothing else.

    Raises ValueError unless each marker is there once, in that order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the tables go between the lines {begin} and {end}, each there once: add them first")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{block}\n{end}{after}"


def write_record(path: Path, environment: dict[str, Any], sections: Sections) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record(environment, sections))


def write_readme(path: Path, environment: dict[str, Any], sections: Sections, name: str = "bench") -> None:
    path.write_text(replace_block(path.read_text(), markdown(environment, sections), name))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
