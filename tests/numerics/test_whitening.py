"""pca, zca and hca against their equations, scikit-learn and long double, and where they must refuse.

Suffixes: N = feature vectors, D = channels.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from statsvc.errors import CannotFit, PlanError
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import fit
from statsvc.numerics.rotation import flat
from statsvc.plan import Whitening
from tests.numerics.test_normalizations import of_covariance
from tests.support.features import COVARIANCES, TEACHERS, Floats, teacher_features, wishart

WHITENINGS = ["pca", "zca", "hca"]
EPS = np.finfo(np.float64).eps


def graded(dim: int, condition: float) -> Floats:
    """A covariance whose eigenvalues fall from 1 to 1 / condition."""
    axes_DD = np.linalg.qr(np.random.default_rng(dim).standard_normal((dim, dim)))[0]
    covariance_DD: Floats = (axes_DD * np.geomspace(1, 1 / condition, dim)) @ axes_DD.T
    return (covariance_DD + covariance_DD.T) / 2


@pytest.mark.parametrize("dim", [1, 3, 12, 37, 191, 192])
@pytest.mark.parametrize("method", WHITENINGS)
def test_targets_are_uncorrelated_with_variance_one(method: str, dim: int) -> None:
    covariance_DD = graded(dim, 1e4)
    transform = fit(of_covariance(covariance_DD, mean_D=2.0), method)
    # eigh errs by a few ulps of the largest eigenvalue, which the gain for the smallest magnifies by the condition.
    assert np.abs(transform.matrix @ covariance_DD @ transform.matrix.T - np.eye(dim)).max() <= 20 * 1e4 * EPS
    assert np.abs(transform.matrix @ transform.inverse - np.eye(dim)).max() <= 1e-12
    assert (transform.alpha, transform.rank, transform.method) == (None, dim, method)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_pca_is_scikit_learns_up_to_signs(teacher: str) -> None:
    x_ND = teacher_features(teacher, 400, 46).astype(np.float64)
    y_ND = fit(Moments.of(x_ND), "pca", max_gain=1e5).apply(x_ND)
    expected_ND = PCA(whiten=True, svd_solver="full").fit_transform(x_ND)
    signs_D = np.sign((y_ND * expected_ND).sum(axis=0))
    # Scikit-learn decomposes the features, not their covariance, whose condition is the square: 1e6 ulps or so.
    assert np.abs(y_ND - expected_ND * signs_D).max() <= 1e-8


def jacobi(covariance_DD: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues, largest first, and axes, by Jacobi's rotations in long double: no LAPACK, and digits to spare."""
    left_DD, axes_DD = covariance_DD.astype(np.longdouble), np.eye(len(covariance_DD), dtype=np.longdouble)
    for _ in range(12):  # sweeps; six are enough
        for p, q in zip(*np.triu_indices(len(left_DD), 1), strict=True):
            angle = np.arctan2(2 * left_DD[p, q], left_DD[q, q] - left_DD[p, p]) / 2
            turn_DD = np.eye(len(left_DD), dtype=np.longdouble)
            turn_DD[p, p] = turn_DD[q, q] = np.cos(angle)
            turn_DD[p, q], turn_DD[q, p] = np.sin(angle), -np.sin(angle)
            left_DD, axes_DD = turn_DD.T @ left_DD @ turn_DD, axes_DD @ turn_DD
    order_D = np.argsort(-np.diagonal(left_DD))
    return np.diagonal(left_DD)[order_D].astype(np.float64), axes_DD[:, order_D].astype(np.float64)


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_each_method_is_its_equation_in_long_double(floor: float) -> None:
    covariance_DD = graded(6, 1e3)
    values_D, axes_DD = jacobi(covariance_DD)
    axes_DD *= np.where(np.diagonal(axes_DD) < 0, -1, 1)
    values_D = np.maximum(values_D, floor * values_D.mean())
    found = flat(values_D)
    hadamard_DD = found.matrix / found.norm
    expected = {
        "pca": np.diag(values_D**-0.5) @ axes_DD.T,
        "zca": axes_DD @ np.diag(values_D**-0.5) @ axes_DD.T,
        "hca": hadamard_DD @ np.diag(values_D**-0.5) @ axes_DD.T,
    }
    for method, matrix_DD in expected.items():
        transform = fit(of_covariance(covariance_DD), method, eigenvalue_floor=floor)
        signs_D1 = np.where(np.diagonal(matrix_DD) < 0, -1, 1)[:, None]
        # Gains reach 30; eigenvectors move by an ulp over the gaps between eigenvalues, here a hundred.
        assert np.abs(transform.matrix - matrix_DD * signs_D1).max() <= 1e4 * EPS * np.abs(matrix_DD).max(), method


def test_zca_is_symmetric_and_changes_features_least() -> None:
    covariance_DD = graded(48, 1e3)
    matrices = {method: fit(of_covariance(covariance_DD), method).matrix for method in WHITENINGS}
    assert np.array_equal(matrices["zca"], matrices["zca"].T)
    assert np.linalg.eigvalsh(matrices["zca"]).min() > 0
    # E |y - x|^2 = trace((M - 1) C (M - 1)^T)
    change = {
        method: np.trace((matrix_DD - np.eye(48)) @ covariance_DD @ (matrix_DD - np.eye(48)).T)
        for method, matrix_DD in matrices.items()
    }
    assert change["zca"] < min(change["pca"], change["hca"])


@pytest.mark.parametrize("method", ["pca", "hca"])
def test_signs_are_canonical(method: str) -> None:
    assert np.all(np.diagonal(fit(of_covariance(graded(37, 1e3)), method).matrix) >= 0)


@pytest.mark.parametrize("floor", [0.0, 0.01])
@pytest.mark.parametrize("dim", [12, 37, 191, 192])
def test_in_hca_an_error_in_any_one_target_is_equally_long_in_the_features(dim: int, floor: float) -> None:
    transform = fit(of_covariance(graded(dim, 1e4)), "hca", eigenvalue_floor=floor)
    length_D = np.linalg.norm(transform.inverse, axis=0)
    assert np.abs(length_D / length_D.mean() - 1).max() <= 1e-12
    assert transform.hadamard == flat(np.ones(dim)).hadamard


@pytest.mark.parametrize("method", WHITENINGS)
def test_eigenvalues_below_the_floor_are_raised_to_it_both_ways(method: str) -> None:
    covariance_DD = graded(24, 1e6)
    values_D, axes_DD = np.linalg.eigh(covariance_DD)
    floor = 0.01 * values_D.mean()
    transform = fit(of_covariance(covariance_DD), method, eigenvalue_floor=0.01)
    # A step of one deviation along an axis: of length 1 after whitening, shorter where the floor is above it.
    lengths_D = np.linalg.norm(transform.matrix @ (axes_DD * np.sqrt(values_D)), axis=0)
    expected_D = np.sqrt(values_D / np.maximum(values_D, floor))
    assert 0 < (expected_D < 1).sum() < 24
    assert np.abs(lengths_D - expected_D).max() <= 1e-9
    assert np.abs(transform.inverse @ transform.matrix - np.eye(24)).max() <= 1e-12
    assert np.linalg.norm(transform.matrix, 2) == pytest.approx(floor**-0.5, rel=1e-12)


@pytest.mark.parametrize("method", WHITENINGS)
def test_a_gain_above_the_limit_is_refused_with_how_many_the_smallest_and_a_way_out(method: str) -> None:
    covariance_DD = np.diag([4.0, 4.0, 3.9, 4e-5, 6e-5])  # 4e-5 is 1.7e-5 of the mean: a gain of 244
    moments = of_covariance(covariance_DD)
    assert fit(moments, method).rank == fit(moments, method, max_gain=245).rank == 5
    reason = r"below 1\.74e-05 of their mean; 1 of 5 are, the smallest is 1\.68e-05, .* max_gain, 240 times"
    with pytest.raises(CannotFit, match=rf"^{method} .*{reason}.*: set whitening\.eigenvalue_floor in the plan"):
        fit(moments, method, max_gain=240)
    # A floor at the limit is just enough.
    assert fit(moments, method, max_gain=100, eigenvalue_floor=1.0001e-4).rank == 5


@pytest.mark.parametrize("kind", ["half the rank", "rank one", "one living channel"])
@pytest.mark.parametrize("method", WHITENINGS)
def test_singular_covariances_are_refused_whatever_the_gain(method: str, kind: str) -> None:
    moments = of_covariance(COVARIANCES[kind](12))
    # What is left of zero by rounding is no eigenvalue.
    for max_gain, reason in ((1000.0, "than max_gain, 1000 times"), (1e300, "divide by what may be rounding")):
        with pytest.raises(CannotFit, match=f"^{method} takes no eigenvalues below .* of 12 are, .*{reason}"):
            fit(moments, method, max_gain=max_gain)
    with pytest.raises(CannotFit, match=rf"^{method} would raise (7|11) of 12 eigenvalues to 0\.001 of their mean"):
        fit(moments, method, eigenvalue_floor=1e-3)


@pytest.mark.parametrize("method", WHITENINGS)
def test_as_few_feature_vectors_as_channels_are_refused_whatever_the_floor(method: str) -> None:
    few = Moments.of(teacher_features("sam", 12, 12).astype(np.float64))
    for floor in (0.0, 0.01):
        with pytest.raises(
            CannotFit, match=f"^{method} needs more feature vectors than channels; 12 of width 12 .* 1 dir"
        ):
            fit(few, method, eigenvalue_floor=floor)


@pytest.mark.parametrize("method", WHITENINGS)
def test_a_layer_norm_that_leaves_one_direction_without_variance_is_whitened_with_the_default_of_plans(
    method: str,
) -> None:
    x_ND = np.random.default_rng(0).standard_normal((4000, 24)) @ np.diag(np.geomspace(1, 5, 24))
    normed_ND = (x_ND - x_ND.mean(axis=1, keepdims=True)) / x_ND.std(axis=1, keepdims=True)
    moments = Moments.of(normed_ND * np.linspace(0.5, 2, 24) + 1)
    with pytest.raises(CannotFit):
        fit(moments, method)
    limits = Whitening()
    transform = fit(moments, method, eigenvalue_floor=limits.eigenvalue_floor, max_gain=limits.max_gain)
    values_D = np.linalg.eigvalsh(transform.matrix @ moments.covariance() @ transform.matrix.T)
    assert abs(values_D[0]) <= 1e-6
    assert np.abs(values_D[1:] - 1).max() <= 1e-9


@pytest.mark.parametrize("option", [{"eigenvalue_floor": -0.1}, {"eigenvalue_floor": np.nan}, {"max_gain": 0.0}])
def test_senseless_limits_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="a fraction, 0 or more, and max_gain a factor above 0"):
        fit(of_covariance(np.eye(4)), "pca", **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["phi-s", "global", "standardize"])
def test_the_limits_leave_the_other_methods_alone(method: str) -> None:
    moments = of_covariance(wishart(12, 40, np.geomspace(1e-3, 1e3, 12)))
    assert fit(moments, method, eigenvalue_floor=0.5, max_gain=1.0).digest == fit(moments, method).digest
