"""The stop rule against errors that are known because the covariance is, and the pilot on a real store.

Suffixes: N = feature vectors, D = channels, k = channels of a target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from statsvc.numerics.moments import Moments, pack
from statsvc.numerics.normalizations import fit
from statsvc.plan import Statistics
from statsvc.storage.local import LocalBackend
from statsvc.store.arrays import declare_group, write_chunk
from statsvc.store.commits import Commit, Ledger
from statsvc.store.layout import FORMAT, moments_arrays
from statsvc.store.reader import Store
from tests.support.features import Floats, wishart
from workers.driver.pilot import Confidence, Halves, Pilot, confidence

D = 64
COVARIANCE_DD = wishart(D, 3 * D, np.geomspace(0.1, 10, D))
ROOT_DD = np.linalg.cholesky(COVARIANCE_DD)


def images(count: int, tokens: int, correlation: float, seed: int) -> Floats:
    """[images, tokens, D] of that covariance; what the tokens of an image share is that part of their variance."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((count, 1, D))
    own = rng.standard_normal((count, tokens, D))
    z: Floats = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    return z @ ROOT_DD.T + 3


def by_image(x_ITD: Floats) -> Halves:
    """Every other image: as good as by the key's hash."""
    first, second = (Moments.of(x_ITD[half::2].reshape(-1, D)) for half in (0, 1))
    return first, second


def by_token(x_ITD: Floats) -> Halves:
    """What the stop rule must not do."""
    first, second = (Moments.of(x_ITD[:, half::2].reshape(-1, D)) for half in (0, 1))
    return first, second


def true_error(halves: Halves, method: str = "phi-s") -> Confidence:
    """How far the output variances of a fit on everything are from 1, for the covariance that made the data."""
    matrix_kD = fit(halves[0].merge(halves[1]), method).matrix
    variance_k = np.diagonal(matrix_kD @ COVARIANCE_DD @ matrix_kD.T)
    if method == "global":  # its variances are not 1 but those of the channels
        variance_k = variance_k / np.diagonal(matrix_kD @ halves[0].merge(halves[1]).covariance() @ matrix_kD.T)
    missed_k = np.abs(variance_k - 1)
    return Confidence(float(np.sqrt(np.mean(missed_k**2))), float(missed_k.max()))


# How far the estimate can be trusted


@pytest.mark.parametrize("method", ["phi-s", "standardize", "global"])
@pytest.mark.parametrize("seed", range(6))
def test_the_predicted_error_of_independent_tokens_is_the_true_one(seed: int, method: str) -> None:
    """Both are an rms over 64 channels of numbers that differ by chance: over 40 seeds 0.65 to 1.52."""
    halves = by_image(images(4000, 1, 0, seed))
    predicted, true = confidence(halves, method), true_error(halves, method)
    assert predicted is not None
    assert 0.6 <= predicted.rms / true.rms <= 1.6
    assert predicted.rms == pytest.approx(np.sqrt(2 / 4000), rel=0.5)


@pytest.mark.parametrize("seed", range(6))
def test_the_predicted_error_of_tokens_that_resemble_each_other_is_the_true_one_only_by_image(seed: int) -> None:
    """32 tokens that share half of their variance count as little as 32 / (1 + 31 / 4) = 3.7 do: sqrt(8.75) = 3."""
    x_ITD = images(800, 32, 0.5, seed)
    true = true_error(by_image(x_ITD)).rms
    image, token = confidence(by_image(x_ITD), "phi-s"), confidence(by_token(x_ITD), "phi-s")
    assert image is not None
    assert token is not None
    assert 0.6 <= image.rms / true <= 1.6
    assert token.rms / true < 0.6
    assert token.rms < image.rms / 2


def test_sixteen_times_the_tokens_quarter_the_predicted_error() -> None:
    few, many = (confidence(by_image(images(count, 1, 0, 9)), "phi-s") for count in (3000, 48_000))
    assert few is not None
    assert many is not None
    assert few.rms / many.rms == pytest.approx(4, rel=0.35)


def test_halves_that_agree_leave_nothing_to_expect_and_the_worst_channel_is_found() -> None:
    first = Moments(1001, np.zeros(4), 1000 * np.diag([1.0, 4.0, 9.0, 16.0]))
    second = Moments(1001, np.zeros(4), 1000 * np.diag([1.0, 4.0, 9.0 * 1.2, 16.0]))
    same, other = confidence((first, first), "standardize"), confidence((first, second), "standardize")
    assert same is not None
    assert other is not None
    assert same.worst <= 1e-15
    # One of four channels is off by 20%; half of that is the sampling error of both halves together.
    assert (other.rms, other.worst) == pytest.approx((0.05, 0.1))


@pytest.mark.parametrize(
    ("rms", "worst", "enough"),
    [(0.01, 0.04, True), (0.0101, 0.04, False), (0.01, 0.0401, False), (0, 0, True), (np.nan, np.nan, False)],
)
def test_one_percent_and_four_at_worst_are_enough(rms: float, worst: float, enough: bool) -> None:
    assert Confidence(rms, worst).enough is enough


def test_halves_that_say_nothing_give_no_confidence() -> None:
    some, one, nothing = (Moments.of(images(1, count, 0, 0)[0]) for count in (9, 1, 0))
    constant = Moments.of(np.ones((9, D)))
    for halves in ((some, one), (one, some), (nothing, nothing), (constant, some)):
        assert confidence(halves, "phi-s") is None
    assert confidence((some, some), "zca", {"max_gain": 1.0}) is None  # refused


# The pilot on a store

HALF = 20_000  # feature vectors in each half of a dataset shard
BASE_DD = np.diag([1.0, 4.0, 9.0, 16.0])


def store_of(path: Path, teachers: dict[str, tuple[str, ...]]) -> Store:
    """An empty store that knows these teachers and their outputs of 4 channels."""
    backend = LocalBackend(str(path))
    declare_group(backend, "", {"format": FORMAT, "rows_per_shard": 8})
    for name, outputs in teachers.items():
        shapes = {output: {"tokens": 2, "dim": 4} for output in outputs}
        declare_group(backend, f"teachers/{name}", {"fingerprint": "f", "preprocessing": {}, "outputs": shapes})
    return Store(backend)


def measured(
    store: Store, shard: int, gains: tuple[float, float], teacher: str = "dino", output: str = "patches", rows: int = 8
) -> None:
    """Commit a dataset shard whose halves have 1, 4, 9, 16 times these variances, as a worker does."""
    specs = moments_arrays(teacher, output, 4)
    scatters = [(HALF - 1) * gain * BASE_DD for gain in gains]
    values = {
        "count": np.array([[HALF, HALF]]),
        "images": np.array([[rows // 2, rows - rows // 2]]),
        "mean": np.zeros((1, 2, 4)),
        "scatter": np.stack([pack(scatter_DD) for scatter_DD in scatters])[None],
    }
    ledger = Ledger(store.backend)
    known = ledger.read("measure", shard, teacher)
    objects = [write_chunk(store.backend, specs[name], shard, values[name]) for name in specs]
    before = known.objects if known else ()
    ledger.write(Commit(phase="measure", shard=shard, teacher=teacher, rows=rows, objects=(*before, *objects)))


# The sums of both halves agree after these, and differ by 10% or more after every other one.
AGREE, UNEQUAL, MEND = (1.0, 1.0), (1.0, 1.6), (1.6, 1.0)


def pilot_of(
    store: Store, shards: list[tuple[float, float]], statistics: Statistics | None = None
) -> tuple[Pilot, list[bool]]:
    """The pilot after all these dataset shards, and whether it was complete after each."""
    for shard, gains in enumerate(shards):
        measured(store, shard, gains)
    pilot, complete = Pilot(store, ["dino"], statistics or Statistics(), "phi-s"), []
    for shard in range(len(shards)):
        pilot.take(shard)
        complete.append(pilot.complete)
    return pilot, complete


@pytest.mark.parametrize(
    ("shards", "complete"),
    [
        ([AGREE, AGREE], [False, True]),
        ([UNEQUAL, MEND, AGREE], [False, False, True]),
        ([AGREE, UNEQUAL, MEND, AGREE], [False, False, False, True]),
        ([UNEQUAL, MEND, UNEQUAL, MEND, AGREE], [False, False, False, False, True]),
        ([UNEQUAL, UNEQUAL, UNEQUAL], [False, False, False]),
    ],
)
def test_the_pilot_is_complete_when_the_stop_rule_holds_twice_running(
    shards: list[tuple[float, float]], complete: list[bool], tmp_path: Path
) -> None:
    pilot, found = pilot_of(store_of(tmp_path, {"dino": ("patches",)}), shards)
    assert found == complete
    assert pilot.converged is complete[-1]
    assert pilot.shards == list(range(len(shards)))


def test_the_pilot_holds_what_it_took_in_that_order_and_nothing_else(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"dino": ("patches",)})
    for shard, gains in enumerate([AGREE, UNEQUAL, MEND, AGREE]):
        measured(store, shard, gains)
    pilot = Pilot(store, ["dino"], Statistics(), "phi-s")
    for shard in (3, 1):
        pilot.take(shard)
    assert pilot.shards == [3, 1]
    assert pilot.images == 16
    teacher = store.teacher("dino")
    for half in (0, 1):
        expected = teacher.shard_moments("patches", 3)[half].merge(teacher.shard_moments("patches", 1)[half])
        taken = pilot.halves["dino", "patches"][half]
        assert taken.count == expected.count == 2 * HALF
        assert taken.scatter.tobytes() == expected.scatter.tobytes()


def test_every_teacher_must_pass_and_in_the_same_two_checks(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"dino": ("patches",), "sam": ("patches",)})
    for shard, (dino, sam) in enumerate(
        [(AGREE, AGREE), (AGREE, UNEQUAL), (UNEQUAL, MEND), (MEND, AGREE), (AGREE, AGREE)]
    ):
        measured(store, shard, dino, "dino")
        measured(store, shard, sam, "sam")
    pilot, complete = Pilot(store, ["dino", "sam"], Statistics(), "phi-s"), []
    for shard in range(5):
        pilot.take(shard)
        complete.append(pilot.complete)
    assert complete == [False, False, False, False, True]


def test_patches_decide_and_the_summary_only_where_there_are_none(tmp_path: Path) -> None:
    both = store_of(tmp_path / "both", {"dino": ("patches", "summary")})
    summary = store_of(tmp_path / "summary", {"dino": ("summary",)})
    for shard in (0, 1):
        measured(both, shard, AGREE, output="patches")
        measured(both, shard, UNEQUAL, output="summary")
        measured(summary, shard, UNEQUAL, output="summary")
    for store, converged in ((both, True), (summary, False)):
        pilot = Pilot(store, ["dino"], Statistics(), "phi-s")
        pilot.take(0)
        pilot.take(1)
        assert pilot.converged is converged


@pytest.mark.parametrize("gains", [AGREE, UNEQUAL])
@pytest.mark.parametrize(
    ("images", "complete"),
    [(9, [False, True, True]), (16, [False, True, True]), (17, [False, False, True]), ("all", [False, False, False])],
)
def test_a_number_of_images_is_taken_whether_converged_or_not(
    images: Any, complete: list[bool], gains: tuple[float, float], tmp_path: Path
) -> None:
    store = store_of(tmp_path, {"dino": ("patches",)})
    pilot, found = pilot_of(store, [gains] * 3, Statistics(images=images))
    assert found == complete
    assert not pilot.converged


def test_the_pilot_ends_unconverged_at_the_largest_number_of_images(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"dino": ("patches",)})
    pilot, complete = pilot_of(store, [UNEQUAL] * 3, Statistics(max_images=16))
    assert complete == [False, True, True]
    assert not pilot.converged


def test_images_are_counted_by_the_teacher_that_could_use_the_fewest(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"dino": ("patches",), "sam": ("patches",)})
    measured(store, 0, AGREE, "dino", rows=8)
    measured(store, 0, AGREE, "sam", rows=5)
    pilot = Pilot(store, ["dino", "sam"], Statistics(), "phi-s")
    pilot.take(0)
    assert pilot.images == 5
