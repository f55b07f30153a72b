"""What a run does when a document is lost that nothing makes anew: it says so, and never fits or guesses by itself."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable

import pytest
from rich.console import Console

import workers.driver.run
from statsvc.errors import PlanError, StoreError
from statsvc.progress import Display
from statsvc.storage.local import LocalBackend
from statsvc.store.paths import copy_path
from tests.support.finished import Finished
from tests.support.tiny import photographs, write_tar
from workers.driver.refit import refit

pytestmark = pytest.mark.usefixtures("unsynced")

FIT = ".statsvc/commits/fit/dino.json"


def transform_of_dino(made: Finished) -> str:
    return f".statsvc/transforms/{made.store.teacher('dino').fits()['patches']['phi-s']}.safetensors"


def report_of_dino(made: Finished) -> str:
    return f".statsvc/reports/{made.store.teacher('dino').fits()['summary']['global']}.json"


OF_A_FIT: dict[str, Callable[[Finished], str]] = {
    "fit commit": lambda _: FIT,
    "transform": transform_of_dino,
    "report": report_of_dino,
}
OF_THE_STORE: dict[str, Callable[[Finished], str]] = {
    "root": lambda _: "zarr.json",
    "teacher": lambda _: "teachers/dino/zarr.json",
}


def lose(made: Finished, path: str, *, twice: bool) -> None:
    (made.path / path).unlink()
    if twice:
        (made.path / copy_path(path)).unlink()


def said_by_run(made: Finished) -> str:
    said = io.StringIO()
    assert workers.driver.run.run(made.plan, Display(Console(file=said, width=200))) == 0
    return said.getvalue()


@pytest.mark.parametrize("kind", [*OF_A_FIT, *OF_THE_STORE])
def test_a_run_refuses_to_go_on_without_a_document_that_has_a_copy(finished: Finished, kind: str) -> None:
    lost = (OF_A_FIT | OF_THE_STORE)[kind](finished)
    lose(finished, lost, twice=False)
    before = finished.contents()
    with pytest.raises(StoreError, match=rf"^{lost} is missing or damaged, .*`statsvc verify --store .* --repair`"):
        finished.run()
    assert finished.contents() == before


@pytest.mark.parametrize("kind", OF_A_FIT)
def test_a_run_refuses_a_lost_fit_and_a_fresh_refit_makes_it_anew(finished: Finished, kind: str) -> None:
    lost = OF_A_FIT[kind](finished)
    lose(finished, lost, twice=True)
    before = finished.contents()
    sentence = rf"^{lost} is lost, .*from a backup, an export or a client cache; or `statsvc refit PLAN .* --fresh`"
    for refused in (finished.run, lambda: refit(finished.plan, Display())):
        with pytest.raises(StoreError, match=sentence):
            refused()
    assert finished.contents() == before
    assert refit(finished.plan, Display(), teachers=["dino"], fresh=True) == 0
    assert finished.run() == 0
    assert "nothing to do" in said_by_run(finished)
    assert (finished.path / lost).exists()


@pytest.mark.parametrize("kind", OF_THE_STORE)
def test_a_run_guesses_no_metadata(finished: Finished, kind: str) -> None:
    lost = OF_THE_STORE[kind](finished)
    lose(finished, lost, twice=True)
    before = finished.contents()
    for refused in (finished.run, lambda: refit(finished.plan, Display(), fresh=True)):
        with pytest.raises(StoreError, match=rf"^{lost} is lost, .*restore it from a backup"):
            refused()
    assert finished.contents() == before


def test_a_damaged_transform_is_refused_before_workers_need_it(finished: Finished) -> None:
    path = finished.path / transform_of_dino(finished)
    path.write_bytes(path.read_bytes()[:-1])
    write_tar(finished.folder / "d.tar", photographs("d0"))
    before = finished.contents()
    with pytest.raises(StoreError, match="is missing or damaged, and its second copy is sound"):
        finished.run()
    assert finished.contents() == before


def test_a_teacher_without_targets_is_fitted_again(finished: Finished) -> None:
    """As after a run that was killed between the pilot and the fit."""
    before = finished.contents()
    lose(finished, FIT, twice=True)
    shutil.rmtree(finished.path / ".statsvc/commits/cache/dino")
    assert finished.run() == 0
    assert finished.contents() == before


def test_a_store_of_an_older_version_gets_its_copies_and_nothing_else(finished: Finished) -> None:
    before = finished.contents()
    shutil.rmtree(finished.path / ".statsvc/copies")
    without = finished.contents()
    said = said_by_run(finished)
    assert "second copies" in said
    assert "nothing to do" in said
    assert "loading" not in said
    assert finished.contents() == before
    assert without.items() <= before.items()
    assert "second copies" not in said_by_run(finished)


def test_a_read_only_store_without_copies_has_nothing_to_do(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(finished.path / ".statsvc/copies")
    before = finished.contents()

    def check(_: LocalBackend) -> None:
        raise PlanError("it cannot be written")

    monkeypatch.setattr(LocalBackend, "check", check)
    assert said_by_run(finished).startswith("nothing to do")
    assert finished.contents() == before


def test_new_shards_wait_while_work_has_no_index(finished: Finished) -> None:
    (finished.path / ".statsvc/commits/index/000001.json").unlink()
    (finished.path / ".statsvc/index.json").unlink()
    write_tar(finished.folder / "new.tar", photographs("n0"))
    before = finished.contents()
    with pytest.raises(StoreError, match=r"work under the number 1 without an index, .*`statsvc verify .* --repair`"):
        finished.run()
    assert finished.contents() == before


def test_numbers_come_back_from_the_written_index(finished: Finished) -> None:
    before = finished.contents()
    (finished.path / ".statsvc/commits/index/000001.json").unlink()
    write_tar(finished.folder / "0.tar", photographs("sorts first"))
    assert finished.run() == 0
    assert {path: finished.contents()[path] for path in before if "commits" in path} == {
        path: data for path, data in before.items() if "commits" in path
    }
