"""The benchmarks' own parts: rows, records, the README's tables, and the script for CUDA machines. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.benchmarks import __main__ as bench
from tests.benchmarks import gpu, peers
from tests.benchmarks.report import markdown, read_record, record, replace_block
from tests.benchmarks.rows import Goal, Row, Table, number

ABOUT = {"device": "CPU", "cpu": "a processor", "cores": 2, "python": "3.11", "versions": {"numpy": "2"}}
TABLES = {
    "storage": [
        Table(
            "Writing",
            (
                Row("write", 2.0, "GB/s", 1.0, "np.save", goal=Goal(0.9)),
                Row("read", 30.0, "us", 15.0, "np.memmap", "less", goal=Goal(0.95)),
                Row("write", 2.0, "GB/s", None, "a peer", note="not measured: ImportError"),
                Row("error", 1e-7, goal=Goal(1e-6, at_most=True, of="ours")),
                Row("codes", 43.0, "dB", 40.0, "others", "decibels"),
            ),
        )
    ],
    "codes": [Table("Grid", (), "A note.", ("code", "SAM", "empty"), (("int8 | int4", "43.7", ""),))],
}
README = "# Title\n\n<!-- bench:begin -->\nold | figures\n<!-- bench:end -->\n\nThe rest.\n"


def test_a_row_says_how_many_times_better_and_whether_its_goal_was_met() -> None:
    rows = TABLES["storage"][0].rows
    assert [row.ratio for row in rows] == [2.0, 0.5, None, None, 3.0]
    assert [row.met for row in rows] == [True, False, None, True, None]
    assert TABLES["storage"][0].missed() == ["Writing: read, against np.memmap"]


def test_a_record_gives_back_what_was_measured() -> None:
    text = record(ABOUT, TABLES)
    assert read_record(text) == (ABOUT, TABLES)
    assert json.loads(text)["sections"]["storage"][0]["rows"][1]["ratio"] == 0.5


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-7, "1e-07"), (0.05349, "0.053"), (2.0, "2"), (43.71, "43.7"), (1290.4, "1290"), (5e9, "5e+09")],
)
def test_figures_keep_what_can_be_trusted(value: float, text: str) -> None:
    assert number(value) == text


def test_tables_replace_exactly_the_marked_block() -> None:
    written = replace_block(README, markdown(ABOUT, TABLES))
    before, after = README.split("old | figures")
    assert written.startswith(before)
    assert written.endswith(after)
    assert "| write | 2 GB/s | np.save: 1 GB/s | 2x | at least 0.9x: met |" in written
    assert "| read | 30 us | np.memmap: 15 us | 0.5x | at least 0.95x: **missed** |" in written
    assert "| write | 2 GB/s | a peer: not measured: ImportError |  |  |" in written
    assert "| int8 \\| int4 | 43.7 |" in written
    assert "empty" not in written
    assert replace_block(written, markdown(ABOUT, TABLES)) == written


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n",
        "<!-- bench:begin -->\n",
        "<!-- bench:end -->\n<!-- bench:begin -->\n",
        f"{README}<!-- bench:begin -->\n",
        README.replace("bench:", "bench-gpu:"),
    ],
)
def test_a_file_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="<!-- bench:begin -->"):
        replace_block(text, "tables")


def test_a_readme_without_markers_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(SystemExit):
        bench.main(["--readme", str(readme)])
    assert "<!-- bench:begin -->" in capsys.readouterr().err
    assert readme.read_text() == "# Title\n"


def test_a_readme_takes_the_tables_of_a_record(tmp_path: Path) -> None:
    readme, figures = tmp_path / "README.md", tmp_path / "record.json"
    readme.write_text(README)
    figures.write_text(record(ABOUT, TABLES))
    assert bench.main(["--from", str(figures), "--readme", str(readme)]) == 0
    assert readme.read_text() == replace_block(README, markdown(ABOUT, TABLES))


def test_an_unknown_section_is_named_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["storge"])
    assert "no section 'storge'; there are storage, statistics" in capsys.readouterr().err


def test_peers_give_back_what_they_wrote_and_one_that_cannot_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {name: peers.PEERS[name] for name in ("zarr-python", "tensorstore", "safetensors")}

    def absent() -> peers.Peer:
        raise ModuleNotFoundError("No module named 'absent'")

    class Forgetful(peers.Safetensors):
        def write(self, folder: Path, data_RTC: NDArray[Any], shard_rows: int | None = None) -> None:
            super().write(folder, np.zeros_like(data_RTC), shard_rows)

    monkeypatch.setattr(peers, "PEERS", {**installed, "absent": absent, "forgetful": Forgetful})
    data_RTC = np.arange(3 * 4 * 5, dtype=np.float16).reshape(3, 4, 5)
    found, missing = peers.working_peers(tmp_path, data_RTC)
    assert set(found) == set(installed), missing
    assert missing == {
        "absent": "ModuleNotFoundError: No module named 'absent'",
        "forgetful": "ValueError: it gives back other numbers",
    }
    assert not list(tmp_path.iterdir())


def test_the_gpu_script_runs_through_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, readme = tmp_path / "gpu.json", tmp_path / "README.md"
    readme.write_text(README.replace("bench:", "bench-gpu:"))
    assert gpu.main(["--device", "cpu", "--small", "--json", str(figures), "--readme", str(readme)]) == 0
    about, sections = read_record(figures.read_text())
    assert about["device"]
    measured = [row.what for table in sections["gpu"] for row in table.rows if row.ours is not None]
    assert {"statistics", "encode int4", "codes into pinned memory", "measure unit", "cache unit"} <= set(measured)
    assert all(row.met for row in sections["gpu"][0].rows)  # accuracy, which does not depend on the device
    assert "| cache unit |" in readme.read_text()
    assert "images/s" in capsys.readouterr().out


def test_without_a_device_the_gpu_script_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
