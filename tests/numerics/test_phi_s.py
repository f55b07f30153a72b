"""PHI-S with fewer channels, and near an older fit.

Suffixes: N = feature vectors, D = channels, k = channels of a target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from statsvc.errors import CannotFit, PlanError
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import fit
from statsvc.numerics.transform import Transform
from tests.numerics.test_normalizations import of_covariance, output_variances
from tests.support.features import COVARIANCES, TEACHERS, Floats, teacher_features, wishart


def power_law(dim: int) -> Floats:
    axes_DD = np.linalg.qr(np.random.default_rng(dim).standard_normal((dim, dim)))[0]
    covariance_DD: Floats = (axes_DD / np.arange(1, dim + 1)) @ axes_DD.T
    return (covariance_DD + covariance_DD.T) / 2


# A rank


@pytest.mark.parametrize("rank", [1, 2, 5, 12, 31, 47, 48])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_rank_keeps_the_leading_components_as_scikit_learn_does(teacher: str, rank: int) -> None:
    x_ND = teacher_features(teacher, 400, 48).astype(np.float64)
    transform = fit(Moments.of(x_ND), "phi-s", rank=rank)
    y_Nk = transform.apply(x_ND)
    assert y_Nk.shape == (400, rank)
    assert np.abs(y_Nk.var(axis=0, ddof=1) - 1).max() <= 1e-12
    assert np.all(np.diagonal(transform.matrix) >= 0)
    pca = PCA(rank, svd_solver="full").fit(x_ND)
    expected_ND = pca.inverse_transform(pca.transform(x_ND))
    # Both are the same projection: subspaces move by an ulp of the largest eigenvalue over the gap at the cut.
    scale = x_ND.std()
    assert np.abs(transform.invert(y_Nk) - expected_ND).max() <= 1e-8 * scale
    assert transform.alpha == pytest.approx(pca.explained_variance_.mean() ** -0.5, rel=1e-12)


def test_what_a_rank_loses_is_the_sum_of_the_other_eigenvalues() -> None:
    x_ND = teacher_features("siglip", 400, 48).astype(np.float64)
    moments = Moments.of(x_ND)
    transform = fit(moments, "phi-s", rank=20)
    lost_ND = transform.invert(transform.apply(x_ND)) - x_ND
    expected = np.linalg.eigvalsh(moments.covariance())[:28].sum()
    assert (lost_ND**2).sum() / 399 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("rank", [1, 8, 13, 24])
def test_a_rank_bears_every_spectrum(kind: str, rank: int) -> None:
    covariance_DD = COVARIANCES[kind](24)
    transform = fit(of_covariance(covariance_DD), "phi-s", rank=rank)
    assert np.abs(output_variances(transform.matrix, covariance_DD) - 1).max() <= 1e-12
    assert np.abs(transform.matrix @ transform.inverse - np.eye(rank)).max() <= 1e-12


def test_a_rank_names_its_own_hadamard_matrix_and_a_full_rank_is_none() -> None:
    moments = of_covariance(power_law(48))
    assert fit(moments, "phi-s", rank=12).hadamard == "P1(12)"
    assert fit(moments, "phi-s", rank=11).hadamard == "minor of P1(12)"
    assert fit(moments, "phi-s", rank=48).digest == fit(moments, "phi-s").digest


@pytest.mark.parametrize("rank", [0, -1, 13])
def test_a_rank_beyond_the_channels_is_refused(rank: int) -> None:
    with pytest.raises(CannotFit, match=f"a rank from 1 to the width of the features, 12; got {rank}"):
        fit(of_covariance(np.eye(12)), "phi-s", rank=rank)


@pytest.mark.parametrize("method", ["global", "standardize", "pca", "zca", "hca"])
def test_rank_and_near_are_for_phi_s_only(method: str) -> None:
    moments = of_covariance(power_law(12))
    options: tuple[dict[str, Any], ...] = ({"rank": 4}, {"near": fit(moments, "phi-s")})
    for option in options:
        with pytest.raises(PlanError, match=f"^{next(iter(option))} is for phi-s, not {method}: leave it out"):
            fit(moments, method, **option)


# Near an older fit


def resampled(covariance_DD: Floats, count: int) -> Floats:
    """The covariance of that many vectors of a covariance: off by sqrt(D / count) or so."""
    root_DD = np.linalg.cholesky(covariance_DD)
    return root_DD @ wishart(len(root_DD), count, seed=1) @ root_DD.T


def rescaled(covariance_DD: Floats, spread: float) -> Floats:
    scale_D = np.exp(spread * np.random.default_rng(0).standard_normal(len(covariance_DD)))
    return covariance_DD * scale_D[:, None] * scale_D


def spiked(covariance_DD: Floats, share: float) -> Floats:
    """One direction more, with that share of all variance."""
    direction_D = np.random.default_rng(0).standard_normal(len(covariance_DD))
    spike_DD = np.outer(direction_D, direction_D) / (direction_D @ direction_D)
    spiked_DD: Floats = covariance_DD + share * np.trace(covariance_DD) * spike_DD
    return spiked_DD


def mean_cosine(one: Transform, other: Transform, covariance_DD: Floats) -> float:
    root_DD = np.linalg.cholesky(covariance_DD)
    x_ND = np.random.default_rng(2).standard_normal((500, len(root_DD))) @ root_DD.T
    y_Nk, z_Nk = one.apply(x_ND), other.apply(x_ND)
    cosine_N = (y_Nk * z_Nk).sum(axis=1) / np.linalg.norm(y_Nk, axis=1) / np.linalg.norm(z_Nk, axis=1)
    return float(cosine_N.mean())


CHANGES: dict[str, tuple[Callable[[Floats], Floats], float]] = {
    "one percent": (lambda c: rescaled(c, 0.005), 0.999),
    "twelve percent": (lambda c: rescaled(c, 0.06), 0.99),
    "another sample": (lambda c: resampled(c, 20_000), 0.999),
    "a new direction": (lambda c: spiked(c, 0.01), 0.99),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dim", [64, 257, 384, pytest.param(1536, marks=pytest.mark.slow)])
def test_targets_near_an_older_fit_resemble_the_old_ones_and_have_variance_one(dim: int, change: str) -> None:
    old_DD = power_law(dim)
    changed, least = CHANGES[change]
    new_DD = changed(old_DD)
    old, moments = fit(of_covariance(old_DD), "phi-s"), of_covariance(new_DD)
    near = fit(moments, "phi-s", near=old)
    assert np.abs(output_variances(near.matrix, new_DD) - 1).max() <= 1e-12
    assert np.abs(near.matrix @ near.inverse - np.eye(dim)).max() <= 1e-12
    assert mean_cosine(old, near, new_DD) >= least
    assert mean_cosine(old, fit(moments, "phi-s"), new_DD) <= 0.97
    assert (near.rotation, near.hadamard) == (f"near {old.digest[:12]}", old.hadamard)


@pytest.mark.parametrize("change", CHANGES)
def test_with_a_rank_the_old_subspace_is_turned_into_the_leading_one(change: str) -> None:
    old_DD = power_law(96)
    new_DD = CHANGES[change][0](old_DD)
    old, moments = fit(of_covariance(old_DD), "phi-s", rank=20), of_covariance(new_DD)
    near, fresh = fit(moments, "phi-s", near=old), fit(moments, "phi-s", rank=20)
    assert near.rank == 20
    assert np.abs(output_variances(near.matrix, new_DD) - 1).max() <= 1e-12
    assert near.alpha == fresh.alpha
    # The same space as that of a fresh fit, so that as little is lost.
    assert np.abs(near.inverse @ near.matrix - fresh.inverse @ fresh.matrix).max() <= 1e-12
    assert mean_cosine(old, near, new_DD) >= max(0.97, mean_cosine(old, fresh, new_DD))


def test_nothing_moves_when_nothing_changed_not_even_signs() -> None:
    moments = of_covariance(power_law(37))
    old = fit(moments, "phi-s")
    flipped = Transform(**{**vars_of(old), "matrix": -old.matrix, "inverse": -old.inverse})
    for older in (old, flipped):
        near = fit(moments, "phi-s", near=older)
        assert np.abs(near.matrix - older.matrix).max() <= 1e-12
        assert near.digest != older.digest or np.array_equal(near.matrix, older.matrix)


def vars_of(transform: Transform) -> dict[str, Any]:
    names = ("method", "mean", "matrix", "inverse", "count", "alpha", "rotation", "hadamard")
    return {name: getattr(transform, name) for name in names}


def test_near_takes_a_phi_s_transform_of_the_same_width_and_rank() -> None:
    moments, old = of_covariance(power_law(12)), fit(of_covariance(power_law(12)), "phi-s", rank=5)
    with pytest.raises(PlanError, match="near takes a phi-s transform; got global"):
        fit(moments, "phi-s", near=fit(moments, "global"))
    with pytest.raises(PlanError, match="as wide as these, 13; got 12"):
        fit(of_covariance(np.eye(13)), "phi-s", near=old)
    with pytest.raises(PlanError, match="the same rank; got 5 for rank=4"):
        fit(moments, "phi-s", near=old, rank=4)
    assert fit(moments, "phi-s", near=old, rank=5).digest == fit(moments, "phi-s", near=old).digest


@pytest.mark.parametrize("kind", COVARIANCES)
def test_near_bears_every_spectrum_even_from_another_world(kind: str) -> None:
    old = fit(of_covariance(wishart(37, 90)), "phi-s")
    covariance_DD = COVARIANCES[kind](37)
    near = fit(of_covariance(covariance_DD), "phi-s", near=old)
    assert np.abs(output_variances(near.matrix, covariance_DD) - 1).max() <= 1e-12
