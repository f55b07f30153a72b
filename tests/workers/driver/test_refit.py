"""`statsvc refit`: new fits on the statistics of a grown dataset, near the old ones, beside what is cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import statsvc
from statsvc.errors import CannotFit, DamagedObject, PlanError
from statsvc.integrity.repair import verify_and_repair
from statsvc.integrity.verify import examine
from statsvc.progress import Display
from statsvc.store.reader import Store
from statsvc.store.sealed import seal
from tests.support.finished import Finished, plan_for
from tests.support.tiny import photographs, write_tar
from workers.driver.fitting import fit_teacher
from workers.driver.refit import refit


@pytest.fixture
def grown(finished: Finished) -> Finished:
    """The finished store after two more dataset shards were cached with its old fits."""
    for name in "de":
        write_tar(finished.folder / f"{name}.tar", photographs(*(f"{name}{i}" for i in range(6))))
    assert finished.run() == 0
    return finished


def refitted(made: Finished, **options: Any) -> int:
    return refit(made.plan, Display(), **options)


def unit_variance_error(store: Store, teacher: str, output: str) -> float:
    """How far the variances of phi-s targets are from 1 on all that was measured, in plain float64."""
    moments, matrix = store.teacher(teacher).moments(output), store.teacher(teacher).transform("phi-s", output).matrix
    return float(np.abs(np.einsum("kd,de,ke->k", matrix, moments.covariance(), matrix) - 1).max())


@pytest.mark.slow
def test_a_refit_has_unit_variances_on_the_new_moments_and_its_targets_resemble_the_old(grown: Finished) -> None:
    old = {n: grown.store.teacher(n).transform("phi-s") for n in ("dino", "siglip")}
    assert refitted(grown) == 0
    for name in ("dino", "siglip"):
        teacher = grown.store.teacher(name)
        assert len(teacher.report()["patches"]["phi-s"]["pilot"]) == 5
        new = teacher.transform("phi-s")
        assert new.digest != old[name].digest
        assert unit_variance_error(grown.store, name, "patches") <= 1e-11
        x_ND = teacher.targets("patches").read(teacher.targets("patches").rows(), "teacher").reshape(-1, new.rank)
        y_old, y_new = old[name].apply(x_ND.astype(np.float64)), new.apply(x_ND.astype(np.float64))
        cosine = np.sum(y_old * y_new) / np.sqrt(np.sum(y_old**2) * np.sum(y_new**2))
        fresh = statsvc.fit(teacher.moments("patches"), "phi-s").apply(x_ND.astype(np.float64))
        assert cosine > 0.9 > np.sum(y_old * fresh) / np.sqrt(np.sum(y_old**2) * np.sum(fresh**2))


@pytest.mark.slow
def test_a_refit_touches_no_cache_set_and_the_next_run_caches_beside_them(grown: Finished) -> None:
    before = grown.contents()
    assert refitted(grown) == 0
    after = grown.contents()
    cached = [path for path in before if "/cache/" in path or path.startswith(".statsvc/transforms")]
    assert {path: after[path] for path in cached} == {path: before[path] for path in cached}
    assert examine(str(grown.path)).damage == []
    (old,) = grown.store.teacher("dino").cache_sets()
    assert grown.run() == 0
    sets = grown.store.teacher("dino").cache_sets()
    assert len(sets) == 2
    assert old in sets
    both = [grown.store.teacher("dino").targets("patches", cache_set=name) for name in sets]
    assert len({targets.transform.digest for targets in both}) == 2
    np.testing.assert_allclose(both[0].read([0], "teacher"), both[1].read([0], "teacher"), atol=0.2)
    assert examine(str(grown.path)).damage == []
    assert grown.run() == 0


def test_only_the_teacher_of_the_digest_is_fitted_anew(grown: Finished) -> None:
    before = {name: grown.store.teacher(name).fits() for name in ("dino", "siglip")}
    digest = before["dino"]["patches"]["phi-s"]
    assert refitted(grown, near=[digest[:12]]) == 0
    assert grown.store.teacher("siglip").fits() == before["siglip"]
    reports = grown.store.teacher("dino").report()
    assert reports["patches"]["phi-s"]["near"] == digest
    assert reports["summary"]["phi-s"]["near"] == before["dino"]["summary"]["phi-s"]
    assert examine(str(grown.path)).damage == []  # each of the two now has a pilot of its own
    assert grown.run() == 0


def test_without_new_dataset_shards_there_is_nothing_to_do(finished: Finished) -> None:
    before = finished.contents()
    assert refitted(finished) == 0
    assert finished.contents() == before


def test_a_fresh_refit_owes_nothing_to_the_old_one(grown: Finished) -> None:
    assert refitted(grown, fresh=True, teachers=["dino"]) == 0
    teacher = grown.store.teacher("dino")
    assert teacher.report()["patches"]["phi-s"]["near"] is None
    expected = statsvc.fit(teacher.moments("patches"), "phi-s")
    assert np.array_equal(teacher.transform("phi-s").matrix, expected.matrix)


@pytest.mark.slow
@pytest.mark.parametrize("finish", [Finished.run, lambda made: refitted(made)], ids=["run", "refit"])
def test_a_refit_that_was_broken_off_is_taken_up_by_the_next_run_or_refit(
    grown: Finished, finish: Callable[[Finished], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the new pilot was written down and before the second fit."""
    import workers.driver.phases.fit

    fitted = list[str]()

    def dies(store: Any, name: str, *rest: Any) -> Any:
        if fitted:
            raise KeyboardInterrupt
        fitted.append(name)
        return fit_teacher(store, name, *rest)

    undisturbed = grown.contents()
    with monkeypatch.context() as patch:
        patch.setattr(workers.driver.phases.fit, "fit_teacher", dies)
        with pytest.raises(KeyboardInterrupt):
            refitted(grown)
    assert examine(str(grown.path)).damage == []  # work that is left to do is no damage
    assert finish(grown) == 0
    resumed = grown.contents()
    assert examine(str(grown.path)).damage == []
    for name in ("dino", "siglip"):
        assert grown.store.teacher(name).report()["patches"]["phi-s"]["near"]
    assert undisturbed.keys() < resumed.keys()
    assert refitted(grown) == 0
    assert grown.run() == 0


def test_a_lost_fit_is_repaired_with_the_same_bytes_also_after_a_refit(grown: Finished) -> None:
    assert refitted(grown) == 0
    assert grown.run() == 0
    before = grown.contents()
    (grown.path / ".statsvc/commits/fit/dino.json").unlink()
    with pytest.raises(DamagedObject, match=r"its second copy is sound: `statsvc verify .* --repair` restores it"):
        grown.run()
    verify_and_repair(str(grown.path), print)
    assert grown.run() == 0
    assert grown.contents() == before


def test_a_missing_transform_of_an_earlier_fit_is_found(grown: Finished) -> None:
    """Without it, the targets of its cache set say nothing."""
    digest = grown.store.teacher("dino").fits()["patches"]["phi-s"]
    assert refitted(grown) == 0
    for path in (f".statsvc/transforms/{digest}.safetensors", f".statsvc/copies/transforms/{digest}.safetensors"):
        (grown.path / path).unlink()
    (damage,) = examine(str(grown.path)).damage
    assert damage.path == f".statsvc/transforms/{digest}.safetensors"
    assert "needs it; both copies are lost" in damage.reason


@pytest.mark.slow
def test_a_missing_transform_that_a_fit_is_near_to_is_found_and_a_fresh_refit_does_without_it(
    grown: Finished,
) -> None:
    for name in ("f", "g"):
        assert refitted(grown) == 0
        write_tar(grown.folder / f"{name}.tar", photographs(f"{name}0"))
    near = grown.store.teacher("dino").report()["patches"]["phi-s"]["near"]
    fits = grown.store.teacher("dino").fits()["patches"]
    (grown.path / f".statsvc/transforms/{near}.safetensors").unlink()
    assert f".statsvc/transforms/{near}.safetensors" in {damage.path for damage in examine(str(grown.path)).damage}
    (grown.path / f".statsvc/transforms/{fits['phi-s']}.safetensors").unlink()
    (grown.path / ".statsvc/commits/fit/dino.json").unlink()
    assert refitted(grown, fresh=True) == 0
    assert isinstance(grown.store.teacher("dino").fits()["patches"]["phi-s"], str)


def test_a_refit_indexes_what_is_new_and_tells_what_it_refuses(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(finished.folder / "d.tar", photographs("d0", "d1"))
    write_tar(finished.folder / "c.tar", photographs(*(f"other{i}" for i in range(40))))
    assert refitted(finished) == 1
    assert "refused: dataset shard c.tar has changed" in capsys.readouterr().out
    assert len(finished.store.teacher("dino").report()["patches"]["phi-s"]["pilot"]) == 3  # a, b and d


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets": {"rank": 8}}, "rank is None there and 8 here"),
        ({"whitening": {"max_gain": 10.0}}, "max_gain is 1000.0 there and 10.0 here"),
        ({"whitening": {"eigenvalue_floor": 0.01}}, "eigenvalue_floor is 1e-06 there and 0.01 here"),
    ],
)
def test_a_run_never_ignores_that_the_plan_would_fit_in_another_way(
    finished: Finished, dinov2: Path, changes: dict[str, Any], sentence: str
) -> None:
    other = Finished(finished.folder, plan_for(finished.folder, dinov2, **changes))
    before = other.contents()
    with pytest.raises(PlanError, match=f"{sentence}.*statsvc refit"):
        other.run()
    assert other.contents() == before


def test_a_refit_takes_the_plans_new_rank(finished: Finished, dinov2: Path) -> None:
    other = Finished(finished.folder, plan_for(finished.folder, dinov2, targets={"rank": 8}))
    with pytest.raises(PlanError, match=r"cannot be near .* whose targets have 32 channels; leave the rank as it was"):
        refitted(other)
    assert refitted(other, fresh=True) == 0
    assert other.run() == 0
    dino = other.store.teacher("dino")
    (small,) = [name for name in dino.cache_sets() if dino.targets("patches", cache_set=name).k == 8]
    assert dino.targets("patches", cache_set=small).read([0]).shape == (1, 16, 8)
    assert dino.targets("patches", cache_set=small).read([0], "teacher").shape == (1, 16, 32)
    assert examine(str(other.path)).damage == []


@pytest.mark.slow
def test_a_method_that_was_refused_is_had_by_a_refit_with_more_images(finished: Finished, dinov2: Path) -> None:
    """17 summaries are too few for 32 channels; 47 are enough."""
    whitened = Finished(finished.folder, plan_for(finished.folder, dinov2, normalize="zca"))
    with pytest.raises(CannotFit, match=r"zca was refused for summary: .*or, with more images .*`statsvc refit PLAN`"):
        whitened.run()
    for name in "defgh":
        write_tar(finished.folder / f"{name}.tar", photographs(*(f"{name}{i}" for i in range(6))))
    assert refitted(whitened) == 0
    assert whitened.run() == 0
    assert any(name.startswith("zca-") for name in whitened.store.teacher("dino").cache_sets())


def test_a_method_that_is_newer_than_a_fit_is_fitted_by_the_next_run_and_the_others_stay(finished: Finished) -> None:
    before = finished.contents()
    path = finished.path / ".statsvc/commits/fit/dino.json"
    fits = {output: {method: fit for method, fit in methods.items() if method != "global"}
            for output, methods in finished.store.teacher("dino").fits().items()}  # fmt: skip
    path.write_bytes(seal(fits))
    assert finished.run() == 0
    assert finished.contents() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"near": ["0" * 64]}, "is not the digest"),
        ({"near": ["abc"]}, "is not the digest"),
        ({"teachers": ["clip"]}, "'clip' is not in the plan; it has dino, siglip"),
        ({"near": ["0" * 64], "fresh": True}, "leave out the others"),
    ],
)
def test_what_cannot_be_refitted_is_refused_and_nothing_is_written(
    finished: Finished, options: dict[str, Any], sentence: str
) -> None:
    before = finished.contents()
    with pytest.raises(PlanError, match=sentence):
        refitted(finished, **options)
    assert finished.contents() == before


def test_only_phi_s_can_be_near_and_only_a_store_can_be_refitted(finished: Finished, dinov2: Path) -> None:
    digest = finished.store.teacher("dino").fits()["patches"]["global"]
    with pytest.raises(PlanError, match="only phi-s can be fitted near another"):
        refitted(finished, near=[digest])
    nowhere = plan_for(finished.folder, dinov2, store=str(finished.folder / "nowhere"))
    with pytest.raises(PlanError, match="statsvc run PLAN"):
        refit(nowhere, Display())
    assert not (finished.folder / "nowhere").exists()
