"""Fitted methods against their definitions, numpy, scikit-learn and the paper's own figures.

Suffixes: N = feature vectors, D = channels, k = channels of a target.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from statsvc.errors import CannotFit, MomentsError, NotFound
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import METHODS, fit, moments_digest
from tests.support.features import COVARIANCES, TEACHERS, Floats, teacher_features

WIDTHS = [192, 256, 320, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 2048]
KINDS = list(COVARIANCES)


def of_covariance(covariance_DD: Floats, mean_D: Floats | float = 0.0, count: int = 1001) -> Moments[Floats]:
    dim = len(covariance_DD)
    return Moments(count, np.full(dim, 1.0) * mean_D, covariance_DD * (count - 1))


def output_variances(matrix_kD: Floats, covariance_DD: Floats) -> Floats:
    """diag(M C M^T) in float64; test_rotation does it in long double where matrices are small."""
    wide_kD = matrix_kD.astype(np.float64)
    variances: Floats = np.einsum("kd,kd->k", wide_kD @ covariance_DD, wide_kD)
    return variances


# PHI-S


@pytest.mark.parametrize(
    ("dim", "kind"),
    [
        pytest.param(dim, KINDS[i % len(KINDS)], marks=[pytest.mark.slow] if dim > 1024 else [])
        for i, dim in enumerate(WIDTHS)
    ]
    + [(dim, kind) for dim in (12, 192) for kind in KINDS],
)
def test_phi_s_gives_every_channel_variance_one_at_every_width_and_for_every_spectrum(dim: int, kind: str) -> None:
    covariance_DD = COVARIANCES[kind](dim)
    matrix_DD = fit(of_covariance(covariance_DD), "phi-s").matrix
    assert np.abs(output_variances(matrix_DD, covariance_DD) - 1).max() <= 1e-12  # measured: at most 2e-14
    # Served as float32, entries are rounded by at most 2^-24 of themselves, 2^-25.8 rms, and a variance by twice the
    # sum over a row. Where few directions hold all variance that sum is smaller than its terms and nothing averages
    # out: 5 sigma of 2 * 2^-25.8, measured 1.9e-7. Elsewhere, as for real teachers, 2e-7 is due: measured 7e-8.
    few_directions = kind in ("rank one", "spiked")
    rounded_DD = matrix_DD.astype(np.float32)
    assert np.abs(output_variances(rounded_DD, covariance_DD) - 1).max() <= (3e-7 if few_directions else 2e-7)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_phi_s_targets_of_real_scales_have_variance_one_in_the_data_itself(teacher: str) -> None:
    x_ND = teacher_features(teacher, 3000, 384)
    exact = fit(Moments.of(x_ND.astype(np.float64)), "phi-s")
    assert np.abs(exact.apply(x_ND.astype(np.float64)).var(axis=0, ddof=1) - 1).max() <= 1e-12
    assert np.abs(exact.apply(x_ND).var(axis=0, ddof=1, dtype=np.float64) - 1).max() <= 2e-7
    # Features are float32 when they are measured: what their moments miss is added.
    measured = fit(Moments.of(x_ND), "phi-s")
    assert np.abs(measured.apply(x_ND.astype(np.float64)).var(axis=0, ddof=1) - 1).max() <= 1e-6


def test_phi_s_equalizes_fewer_feature_vectors_than_channels() -> None:
    x_ND = teacher_features("sam", 50, 192).astype(np.float64)
    y_ND = fit(Moments.of(x_ND), "phi-s").apply(x_ND)
    assert np.abs(y_ND.var(axis=0, ddof=1) - 1).max() <= 1e-12
    assert np.abs(y_ND.mean(axis=0)).max() <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_phi_s_is_a_rotation_times_one_scalar_with_canonical_signs(kind: str) -> None:
    covariance_DD = COVARIANCES[kind](192)
    transform = fit(of_covariance(covariance_DD, mean_D=3.0), "phi-s")
    phi = np.sqrt(np.trace(covariance_DD) / 192)
    assert transform.alpha == pytest.approx(1 / phi, rel=1e-15)
    rotation_DD = transform.matrix * phi
    assert np.abs(rotation_DD @ rotation_DD.T - np.eye(192)).max() <= 1e-13
    assert np.abs(transform.inverse - rotation_DD.T * phi).max() <= 1e-13 * phi
    assert np.all(np.diagonal(transform.matrix) >= 0)
    assert (transform.rotation, transform.hadamard) == ("hadamard", "S(16) x P1(12)")


@pytest.mark.parametrize("kind", KINDS)
def test_phi_s_needs_no_hadamard_matrix_of_its_width(kind: str) -> None:
    covariance_DD = COVARIANCES[kind](191)
    transform = fit(of_covariance(covariance_DD), "phi-s")
    assert np.abs(output_variances(transform.matrix, covariance_DD) - 1).max() <= 1e-12
    assert np.all(np.diagonal(transform.matrix) >= 0)
    assert (transform.rotation, transform.hadamard) == ("hadamard minor, givens", "minor of S(16) x P1(12)")


# The paper's figures


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_gains_are_those_of_the_papers_table_8(teacher: str) -> None:
    """Two digits for SAM, so half a unit of the last digit is 2.6%; sampling adds sqrt(2 / 3000)."""
    x_ND = teacher_features(teacher, 3000, 1152)
    moments, scales = Moments.of(x_ND), TEACHERS[teacher]
    assert fit(moments, "global").alpha == pytest.approx(scales.alpha_global, rel=0.03)
    assert 1 / np.sqrt(np.trace(moments.covariance()) / 1152) == pytest.approx(scales.alpha_phi_s, rel=0.03)


# Global


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_global_scale_is_that_of_all_numbers_together(teacher: str) -> None:
    x_ND = teacher_features(teacher, 400, 48).astype(np.float64)
    transform = fit(Moments.of(x_ND), "global")
    assert transform.alpha is not None
    # numpy divides by N where a covariance divides by N - 1, which is in the channels' own variances only.
    expected = x_ND.var() + x_ND.var(axis=0, ddof=1).mean() / 400
    assert transform.alpha**-2 == pytest.approx(expected, rel=1e-13)
    assert transform.alpha**-2 == pytest.approx(x_ND.var(), rel=1 / 399)
    y_ND = transform.apply(x_ND)
    assert np.allclose(y_ND, (x_ND - x_ND.mean()) / np.sqrt(expected), rtol=0, atol=1e-12)
    assert y_ND.var() == pytest.approx(1, abs=1 / 399)


def test_global_and_phi_s_have_one_gain_exactly_when_all_channel_means_are_equal() -> None:
    covariance_DD = COVARIANCES["full rank"](12)
    same, different = of_covariance(covariance_DD, 7.0), of_covariance(covariance_DD, np.arange(12.0))
    assert fit(same, "global").alpha == pytest.approx(fit(same, "phi-s").alpha, rel=1e-14)
    assert fit(different, "phi-s").alpha == fit(same, "phi-s").alpha
    variance = np.trace(covariance_DD) / 12 + np.arange(12).var()
    assert fit(different, "global").alpha == pytest.approx(variance**-0.5, rel=1e-14)


# Standardize


@pytest.mark.parametrize("teacher", TEACHERS)
def test_standardize_is_scikit_learns_up_to_its_ddof(teacher: str) -> None:
    x_ND = teacher_features(teacher, 400, 46).astype(np.float64)  # a width without a Hadamard matrix
    y_ND = fit(Moments.of(x_ND), "standardize").apply(x_ND)
    expected_ND = StandardScaler().fit_transform(x_ND) * np.sqrt(399 / 400)
    assert np.allclose(y_ND, expected_ND, rtol=0, atol=1e-11)
    assert np.allclose(y_ND.var(axis=0, ddof=1), 1, rtol=1e-12)


# What every method does


@pytest.mark.parametrize("method", METHODS)
def test_targets_have_zero_mean_and_methods_say_what_they_were_fitted_on(method: str) -> None:
    x_ND = teacher_features("siglip", 500, 48).astype(np.float64)
    moments = Moments.of(x_ND)
    transform = fit(moments, method, output="patches", fingerprint="f" * 64)
    assert abs(transform.apply(x_ND).mean()) <= 1e-12
    assert (transform.method, transform.output, transform.fingerprint) == (method, "patches", "f" * 64)
    assert (transform.count, transform.rank) == (500, 48)
    assert transform.moments_digest == moments_digest(moments)
    assert transform.matrix.dtype == transform.inverse.dtype == transform.mean.dtype == np.float64


def test_the_digest_of_moments_is_that_of_their_numbers() -> None:
    moments = Moments.of(teacher_features("dinov2", 90, 3))
    numbers = [*moments.mean.tolist(), *moments.scatter.ravel().tolist()]
    assert moments_digest(moments) == hashlib.sha256(struct.pack("<q12d", 90, *numbers)).hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_features_that_never_vary_are_refused(method: str) -> None:
    constant_ND = np.full((9001, 12), 0.1, np.float32)  # in several blocks, where means could differ by rounding
    moments = Moments.of(constant_ND).merge(Moments.of(constant_ND[:77]))
    with pytest.raises(CannotFit, match=f"^{method} .*(9078 feature vectors|12 of 12 channels)"):
        fit(moments, method)


def test_a_dead_channel_is_refused_by_standardize_alone() -> None:
    x_ND = teacher_features("sam", 9001, 12)
    x_ND[:, 5] = 0.1
    moments = Moments.of(x_ND)
    with pytest.raises(CannotFit, match=r"1 of 12 channels never vary \(first: 5\): use phi-s or global"):
        fit(moments, "standardize")
    for method in ("phi-s", "global"):
        y_ND = fit(moments, method).apply(x_ND.astype(np.float64))
        assert np.isfinite(y_ND).all()
    assert np.abs(fit(moments, "phi-s").apply(x_ND.astype(np.float64)).var(axis=0, ddof=1) - 1).max() <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_one_feature_vector_is_not_enough(method: str) -> None:
    with pytest.raises(MomentsError, match="at least 2 feature vectors; got 1"):
        fit(Moments.of(teacher_features("sam", 1, 12)), method)


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(NotFound, match="'phi_s'; there are phi-s, global, standardize, pca, zca, hca"):
        fit(of_covariance(np.eye(4)), "phi_s")


# Equal moments, equal digests

DIGESTS = """
import sys
import numpy as np
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import METHODS, fit
rng = np.random.default_rng(0)
scatter_DD = rng.standard_normal((384, 384))
scatter_DD = np.einsum("ni,nj->ij", scatter_DD, scatter_DD)  # no BLAS, whose bits depend on threads
for method in METHODS:
    print(fit(Moments(5000, rng.standard_normal(384), scatter_DD), method).digest)
"""


def digests_with(threads: int) -> str:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | {name: str(threads) for name in names}
    done = subprocess.run([sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
def test_the_same_moments_give_the_same_digests_whatever_the_thread_settings() -> None:
    alone = digests_with(1)
    assert len(set(alone.split())) == len(METHODS)
    assert digests_with(2) == alone
    assert digests_with(4) == alone
