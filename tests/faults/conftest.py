"""`make fault-test`: faults for real, and at the end a table of what was survived.

    python -m pytest -o python_files='fault_*.py' tests/faults [--faults-json FILE] [--faults-readme README.md]

The second writes the table between `<!-- faults:begin -->` and `<!-- faults:end -->`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.records import Line, terminal, write
from tests.faults.site import Site
from tests.support.finished import *  # noqa: F403
from tests.support.object_storage import *  # noqa: F403
from tests.support.tiny import photographs, write_tar

LINES = pytest.StashKey[dict[str, Line]]()
Faults = Callable[[str], Line]
BROKEN = "b-broken"  # the key of a sample whose image cannot be decoded
WORDS = "b-words"  # of one without an image
UNUSABLE = {BROKEN, WORDS}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-json", type=Path, help="where the table goes as JSON")
    parser.addoption("--faults-readme", type=Path, help="the file whose table is replaced")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = list(config.stash.get(LINES, {}).values())
    if lines:
        terminalreporter.section("faults")
        for text in terminal(lines):
            terminalreporter.line(text)
        write(lines, config.getoption("--faults-json", None), config.getoption("--faults-readme", None))


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Faults:
    """The line of the table for one kind of fault; tests that name the same kind share it."""
    lines = request.config.stash.setdefault(LINES, {})

    def line(kind: str) -> Line:
        return lines.setdefault(kind, Line(kind))

    return line


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four dataset shards of 9, 7, 6 and 5 samples; in b one cannot be decoded and one has no image."""
    folder = tmp_path_factory.mktemp("dataset") / "photos"
    folder.mkdir()
    for name, count in (("a", 9), ("b", 5), ("c", 6), ("d", 5)):
        members = photographs(*(f"{name}{number}" for number in range(count)))
        if name == "b":
            members[2:2] = [(f"{BROKEN}.jpg", b"\xff\xd8\xff no photograph"), (f"{WORDS}.json", b"{}")]
        write_tar(folder / f"{name}.tar", members)
    return folder


@pytest.fixture(scope="session")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A finished store of these photographs."""
    site = new_site(tmp_path_factory.mktemp("undisturbed"), photos)
    ended = site.run()
    assert ended.code == 0, ended
    return site


@pytest.fixture
def site(photos: Path, tmp_path: Path) -> Site:
    """The same photographs, without a store."""
    return new_site(tmp_path, photos)


@pytest.fixture
def finished_site(undisturbed: Site, tmp_path: Path) -> Site:
    """The same with a copy of the finished store."""
    shutil.copytree(undisturbed.store, tmp_path / "store")
    return new_site(tmp_path, undisturbed.photos)


def new_site(folder: Path, photos: Path, location: str = "") -> Site:
    shutil.copytree(photos, folder / "photos")
    return Site(folder, location)
