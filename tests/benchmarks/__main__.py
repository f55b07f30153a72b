"""`make bench`: limits, peers and goals, one table after the other, measured in one run.

    python -m tests.benchmarks [SECTION ...] [--json RECORD] [--readme README.md]
    python -m tests.benchmarks --from RECORD --readme README.md      writes the tables of a record, measures nothing

Without sections all are run. `--readme` replaces what stands between `<!-- bench:begin -->` and `<!-- bench:end -->`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.report import Sections, read_record, replace_block, terminal, write_readme, write_record
from tests.benchmarks.rows import Table, environment

# In this order in the README; each is a module of this package with a function `tables`.
SECTIONS = ("storage", "statistics", "fits", "codes", "images", "pipeline", "workers", "service", "training")


def measure(section: str, found: dict[str, str]) -> list[Table]:
    """The section's tables; versions of the peers that only it sees are entered in `found`."""
    tables = importlib.import_module(f"tests.benchmarks.{section}").tables()
    if isinstance(tables, tuple):
        tables, versions = tables
        found.update(versions)
    return list(tables)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--readme", type=Path, help="the file whose tables are replaced")
    parser.add_argument("--from", dest="record", type=Path, help="a record to take the figures from")
    chosen = parser.parse_args(arguments)
    if unknown := [name for name in chosen.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if chosen.readme and chosen.sections:
        parser.error("--readme takes all sections: the tables of the README are measured in one run")
    try:
        if chosen.readme:  # before minutes are spent on figures that find no place
            replace_block(chosen.readme.read_text(), "")
    except (OSError, ValueError) as error:
        parser.error(f"{chosen.readme}: {error}")
    if chosen.record:
        about, sections = read_record(chosen.record.read_text())
    else:
        about = environment()
        sections = measured(chosen.sections or SECTIONS, about["versions"])
    if chosen.json:
        write_record(chosen.json, about, sections)
    if chosen.readme:
        write_readme(chosen.readme, about, sections)
    missed = [each for tables in sections.values() for table in tables for each in table.missed()]
    print("\nevery goal was met" if not missed else "\ngoals missed:\n  " + "\n  ".join(missed))
    return 0


def measured(names: Iterable[str], versions: dict[str, str]) -> Sections:
    sections: Sections = {}
    for name in names:
        begun = time.monotonic()
        sections[name] = measure(name, versions)
        for table in sections[name]:
            print(terminal(table), flush=True)
        print(f"\n({name}: {time.monotonic() - begun:.0f} s)", flush=True)
    return sections


if __name__ == "__main__":
    sys.exit(main())
