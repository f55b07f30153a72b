"""A teacher that gives NaN or another shape for one image, or has too little memory for one batch.

Suffixes: D = channels, T = tokens, k = channels of a target.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import statsvc
from tests.faults.conftest import UNUSABLE, Faults, new_site
from tests.faults.inside.models import NAN, WRONG_SHAPE
from tests.faults.site import TEACHER, Site
from tests.support.tiny import photographs, plain_image, write_tar

MISBEHAVING = {**TEACHER, "model": "models:misbehaving"}


def new(folder: Path, photos: Path, fits: int = 1000) -> Site:
    site = new_site(folder, photos)
    site.plan(teachers={"own": {**MISBEHAVING, "options": {"fits": fits}}})
    return site


@pytest.fixture
def marked(photos: Path, tmp_path: Path) -> Path:
    """The photographs with two more in c: one that gives NaN, one that gives another shape."""
    folder = tmp_path / "marked" / "photos"
    shutil.copytree(photos, folder)
    members = photographs(*(f"c{number}" for number in range(6)))
    members[1:1] = [("c-nan.png", plain_image(NAN))]
    members[5:5] = [("c-shape.png", plain_image(WRONG_SHAPE))]
    write_tar(folder / "c.tar", members)
    return folder


def test_an_image_that_gives_nan_or_another_shape_is_counted_and_named_and_spoils_no_other(
    marked: Path, tmp_path: Path, undisturbed: Site, faults: Faults
) -> None:
    line = faults("teacher gives NaN or another shape for an image")
    like = new(tmp_path / "like", marked)
    assert like.run().code == 0
    site = new(tmp_path / "site", marked)
    with site.started(hold="commit cache 2") as driver:  # what misbehaves is done again as well
        driver.wait_until_held()
        (worker,) = driver.workers()
        worker.send_signal(signal.SIGKILL)
        driver.release()
        assert driver.end().code == 0
    (cached,) = site.status()["teachers"]["own"]["cached"].values()
    assert {f["key"]: f["reason"] for f in cached["failed"] if f["dataset_shard"] == "c.tar"} == {
        "c-nan": "a feature is NaN or infinite",
        "c-shape": "the teacher gave outputs of another shape",
    }
    assert cached["status"]["non-finite"] == cached["status"]["wrong-shape"] == 1
    # The moments of the photographs are those of a store without the two.
    for ours, theirs in zip(moments(site), moments(undisturbed), strict=True):
        assert ours.count == theirs.count
        # Other batches, the same blocks: float64 sums in another order, of numbers near 10.
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(ours.covariance(), theirs.covariance(), rtol=1e-6, atol=1e-9)
    line.settle(site, like, injected=2, unusable={*UNUSABLE, "c-nan", "c-shape"})


def moments(site: Site) -> list[Any]:
    teacher = statsvc.open(site.location).teacher("own")
    return [teacher.moments(output) for output in ("patches", "summary")]


def test_a_batch_that_does_not_fit_into_memory_is_split_and_its_commit_says_so(
    photos: Path, tmp_path: Path, undisturbed: Site, faults: Faults
) -> None:
    line = faults("teacher out of memory for a batch")
    site = new(tmp_path / "site", photos, fits=3)
    assert site.run().code == 0
    commits = [json.loads(path.read_bytes()) for path in site.store.glob(".statsvc/commits/cache/own/*/*.json")]
    # Batches of four; those of 1 to 3 images at the end of a shard fit.
    assert [commit["batch_split"] for commit in commits] == [True] * 4
    for ours, theirs in zip(moments(site), moments(undisturbed), strict=True):
        assert ours.count == theirs.count
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-6)
        np.testing.assert_allclose(ours.covariance(), theirs.covariance(), rtol=1e-5, atol=1e-6)
    ours, theirs = (statsvc.open(s.location).teacher("own").targets("patches") for s in (site, undisturbed))
    rows = theirs.rows()
    assert list(ours.rows()) == list(rows)
    line.injected += 1
    # In the teacher's space, two int8 codes of the same feature differ by a step at most.
    y_NTD, x_NTD = ours.read(rows, space="teacher"), theirs.read(rows, space="teacher")
    assert np.abs(y_NTD - x_NTD).max() < 0.02 * np.abs(x_NTD).max()
    line.verify(site)
    line.passed(1, "moments and targets with an undisturbed run, to float tolerance")
