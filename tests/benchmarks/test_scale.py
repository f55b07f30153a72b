"""The benchmark of scale at the size of a test, so that it still runs when somebody needs its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import scale, scale_store
from tests.benchmarks.report import read_record
from workers.engines import ENGINES

pytestmark = pytest.mark.slow

README = "# Title\n\n<!-- scale:begin -->\nold\n<!-- scale:end -->\n\nThe rest.\n"


def without_processes(*arguments: str) -> dict[str, float]:
    """What one would tell; but the driver that is killed has to be one."""
    if arguments[0] == "run" and arguments[-1] != "-1":
        return a_process(*arguments)
    return {**scale_store.measured(*arguments), "process": 1.0}


a_process = scale.child


def test_every_figure_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENGINES, "inline", ENGINES["inline"])  # which a run in this process replaces
    monkeypatch.setattr(scale, "child", without_processes)
    figures, readme = tmp_path / "scale.json", tmp_path / "README.md"
    readme.write_text(README)
    given = ["--shards", "200", "--sizes", "1", "--folder", str(tmp_path), "--json", str(figures)]
    assert scale.main([*given, "--readme", str(readme)]) == 0
    grid = read_record(figures.read_text())[1]["scale"][0]
    assert [line[0] for line in grid.lines] == list(scale.UNITS)
    assert all(cell for line in grid.lines for cell in line[1:2])
    assert grid.lines[-1][0] == "files of the store"
    assert "| statsvc run, nothing to do |" in readme.read_text()
    assert "200 dataset shards" in capsys.readouterr().out
    assert not list(tmp_path.glob("statsvc-scale-*"))


def test_growth_is_told_as_a_power_of_the_size() -> None:
    """Ten times the dataset shards at 100 times the seconds are a power of two."""
    name = "a run to its end"
    found = {100: dict.fromkeys(scale.UNITS, 1.0), 1000: dict.fromkeys(scale.UNITS, 1.0) | {name: 100.0}}
    grid, goals = scale.tables(found)
    lines = {line[0]: line[1:] for line in grid.lines}
    assert lines[name] == ("1 s", "100 s", "power 2.00")
    assert lines["statsvc status"] == ("1 s", "1 s", "power 0.00")
    assert all(row.met for row in goals.rows)
