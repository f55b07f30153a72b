"""Folded layers against layer and Denormalize, and against the equations in float64.

Suffixes: D = channels of the teacher, k = channels of a target, r = replicas, i = channels a layer takes,
B = rows, T = tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from statsvc.errors import PlanError, TransformError
from statsvc.numerics.normalizations import METHODS
from statsvc.numerics.transform import Transform
from statsvc.student.modules.fold import Order, fold_inverse
from statsvc.student.modules.normalize import Denormalize
from tests.student.modules.test_normalize import fitted
from tests.support.features import TEACHERS

HALF_ULP = 2.0**-24
WIDTH = 40  # channels that a layer takes
LAYERS: dict[str, Callable[[int], nn.Linear | nn.Conv2d]] = {
    "linear": lambda outputs: nn.Linear(WIDTH, outputs),
    "linear without a bias": lambda outputs: nn.Linear(WIDTH, outputs, bias=False),
    "1x1": lambda outputs: nn.Conv2d(WIDTH, outputs, 1),
    "1x1 without a bias": lambda outputs: nn.Conv2d(WIDTH, outputs, 1, bias=False),
    "3x3, stride 2, padded": lambda outputs: nn.Conv2d(WIDTH, outputs, 3, stride=2, padding=1, padding_mode="reflect"),
}


def layer_of(kind: str, outputs: int) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(0)
    return LAYERS[kind](outputs)


def inputs(kind: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 9, WIDTH) if kind.startswith("linear") else torch.randn(2, WIDTH, 5, 7)


def wide(array: torch.Tensor) -> NDArray[np.float64]:
    return array.detach().double().numpy()


def bound(layer: nn.Linear | nn.Conv2d, x: torch.Tensor, transform: Transform) -> torch.Tensor:
    """How far float32 may take either side: half an ulp per term and rounding, of the sum of the sizes of all terms."""
    sizes = copy.deepcopy(layer).double()
    for parameter in sizes.parameters():
        parameter.data.abs_()
    terms = layer.weight[0].numel() + transform.rank + 6
    channels_last = sizes(x.double().abs()).detach().movedim(1 if x.ndim == 4 else -1, -1)
    total = channels_last @ torch.tensor(np.abs(transform.inverse)).T + torch.tensor(np.abs(transform.mean))
    bounds: torch.Tensor = terms * HALF_ULP * total.movedim(-1, 1 if x.ndim == 4 else -1)
    return bounds


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dim", [192, 190])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_folded_layer_says_what_layer_and_denormalize_say(method: str, teacher: str, dim: int, kind: str) -> None:
    transform, x = fitted(method, teacher, dim), inputs(kind)
    layer = layer_of(kind, dim)
    with torch.no_grad():
        difference = fold_inverse(layer, transform)(x).double() - Denormalize(transform)(layer(x)).double()
        # Both sides may err. Measured: 1/50 of it at most.
        assert (difference.abs() <= 2 * bound(layer, x, transform)).all()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_with_a_rank_the_folded_layer_has_all_channels_of_the_teacher(teacher: str, kind: str) -> None:
    transform, x = fitted("phi-s", teacher, 192, 48), inputs(kind)
    layer = layer_of(kind, 48)
    folded = fold_inverse(layer, transform)
    assert len(folded.weight) == 192
    with torch.no_grad():
        difference = folded(x).double() - Denormalize(transform)(layer(x)).double()
        assert (difference.abs() <= 2 * bound(layer, x, transform)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_the_equations_in_float64_rounded_once(method: str, kind: str, dtype: torch.dtype) -> None:
    transform, layer = fitted(method), layer_of(kind, 192).to(dtype)
    folded = fold_inverse(layer, transform)
    weight_Di = transform.inverse @ wide(layer.weight.flatten(1))
    bias_D = transform.mean if layer.bias is None else transform.inverse @ wide(layer.bias) + transform.mean
    assert folded.bias is not None
    assert (folded.weight.dtype, folded.bias.dtype) == (dtype, dtype)
    half_ulp, float64 = torch.finfo(dtype).eps / 2, 1e-13  # two orders of summation differ by less
    assert np.all(np.abs(wide(folded.weight.flatten(1)) - weight_Di) <= half_ulp * np.abs(weight_Di) + float64)
    assert np.all(np.abs(wide(folded.bias) - bias_D) <= half_ulp * np.abs(bias_D) + float64)


def test_a_head_before_pixel_shuffle_folds_channel_by_channel() -> None:
    transform, x_BiHW = fitted("phi-s", dim=192, rank=48), inputs("1x1")
    head, shuffle = layer_of("1x1", 4 * 48), nn.PixelShuffle(2)
    expected_BDHW = Denormalize(transform)(shuffle(head(x_BiHW)))
    folded_BDHW = shuffle(fold_inverse(head, transform, replicas=4, order="channel-major")(x_BiHW))
    assert folded_BDHW.shape == (2, 192, 10, 14)
    bound_BDHW = shuffle(bound(first_replica(head), x_BiHW, transform).repeat_interleave(4, dim=1))
    # Replicas have weights of their own but of one size: four times the bound of the first is ample.
    assert ((folded_BDHW - expected_BDHW).abs() <= 4 * bound_BDHW).all()
    wrong_BDHW = shuffle(fold_inverse(head, transform, replicas=4)(x_BiHW))
    assert ((wrong_BDHW - expected_BDHW).abs() > 4 * bound_BDHW).any()


def first_replica(head: nn.Linear | nn.Conv2d) -> nn.Conv2d:
    assert head.bias is not None
    first = nn.Conv2d(WIDTH, 48, 1, bias=False)
    first.weight, first.bias = nn.Parameter(head.weight[::4]), nn.Parameter(head.bias[::4])
    return first


def test_a_linear_head_of_several_targets_per_token_folds_replica_by_replica() -> None:
    transform, x_BTi = fitted("phi-s", dim=192, rank=48), inputs("linear")
    head = nn.Linear(WIDTH, 4 * 48)
    said_BTrk = head(x_BTi).unflatten(-1, (4, 48))
    expected_BTrD = torch.stack([Denormalize(transform)(said_BTrk[:, :, r]) for r in range(4)], dim=2)
    folded_BTrD = fold_inverse(head, transform, replicas=4)(x_BTi).unflatten(-1, (4, 192))
    for r in range(4):
        one = nn.Linear(WIDTH, 48)
        one.weight, one.bias = nn.Parameter(head.weight[r * 48 :][:48]), nn.Parameter(head.bias[r * 48 :][:48])
        bound_BTD = 2 * bound(one, x_BTi, transform)
        assert ((folded_BTrD - expected_BTrD)[:, :, r].abs() <= bound_BTD).all()
    wrong_BTrD = fold_inverse(head, transform, 4, "channel-major")(x_BTi).unflatten(-1, (4, 192))
    assert not torch.allclose(wrong_BTrD, expected_BTrD, atol=0.1)


@pytest.mark.parametrize("order", ["replica-major", "channel-major"])
def test_one_replica_has_one_order(order: Order) -> None:
    layer = nn.Linear(WIDTH, 192)
    folded, plain = fold_inverse(layer, fitted("phi-s"), 1, order), fold_inverse(layer, fitted("phi-s"))
    assert torch.equal(folded.weight, plain.weight)
    assert torch.equal(folded.bias, plain.bias)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_given_layer_and_the_state_of_the_random_numbers_stay_as_they_are(kind: str) -> None:
    layer = layer_of(kind, 192)
    before, random = copy.deepcopy(layer), torch.get_rng_state()
    folded = fold_inverse(layer, fitted("phi-s"))
    assert torch.equal(torch.get_rng_state(), random)
    assert repr(layer) == repr(before)
    for name, parameter in before.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter)
    with torch.no_grad():
        folded.weight.zero_()
    assert layer.weight.any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", "Linear(in_features=40, out_features=192, bias=True)"),
        ("linear without a bias", "Linear(in_features=40, out_features=192, bias=True)"),
        ("1x1", "Conv2d(40, 192, kernel_size=(1, 1), stride=(1, 1))"),
        ("1x1 without a bias", "Conv2d(40, 192, kernel_size=(1, 1), stride=(1, 1))"),
        (
            "3x3, stride 2, padded",
            "Conv2d(40, 192, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), padding_mode=reflect)",
        ),
    ],
)
def test_the_new_layer_says_its_new_width(kind: str, expected: str) -> None:
    layer = layer_of(kind, 48)
    assert repr(fold_inverse(layer, fitted("phi-s", dim=192, rank=48))) == expected


def test_modes_stay_and_so_does_what_is_trained() -> None:
    layer = nn.Linear(WIDTH, 192).eval()
    layer.weight.requires_grad_(False)
    folded = fold_inverse(layer, fitted("phi-s"))
    assert (folded.training, folded.weight.requires_grad, folded.bias.requires_grad) == (False, False, True)
    bare = nn.Linear(WIDTH, 192, bias=False)
    made = fold_inverse(bare, fitted("phi-s")).bias
    assert made.requires_grad
    assert not fold_inverse(bare.requires_grad_(False), fitted("phi-s")).bias.requires_grad
    assert isinstance(made, nn.Parameter)
    assert made.is_leaf


@pytest.mark.parametrize("put", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_device_stays(put: str) -> None:
    layer = nn.Linear(WIDTH, 192).to(put)
    folded = fold_inverse(layer, fitted("phi-s"))
    assert {parameter.device.type for parameter in folded.parameters()} == {put}
    assert torch.equal(folded.cpu().weight, fold_inverse(layer.cpu(), fitted("phi-s")).weight)


def test_a_folded_layer_has_the_state_dict_of_an_ordinary_one() -> None:
    folded = fold_inverse(nn.Linear(WIDTH, 48, bias=False), fitted("phi-s", dim=192, rank=48))
    nn.Linear(WIDTH, 192).load_state_dict(folded.state_dict())


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        layer: nn.Module = weight_norm(nn.Linear(WIDTH, 192))
    return layer


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Doubled(WIDTH, 192), "got Doubled"),
        (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, 192)), "got ParametrizedLinear"),
        (old_weight_norm, "a weight of their own; got Linear"),
        (lambda: nn.ConvTranspose2d(WIDTH, 192, 1), "got ConvTranspose2d"),
        (lambda: nn.Conv1d(WIDTH, 192, 1), "got Conv1d"),
        (lambda: nn.Sequential(nn.Linear(WIDTH, 192)), "got Sequential"),
        (lambda: nn.LazyLinear(192), "got LazyLinear"),
        (lambda: nn.Conv2d(WIDTH, 192, 1, groups=2), "must have one group; got 2"),
        (lambda: nn.Linear(WIDTH, 191), "192 channels, 192 with 1 replicas; the layer has 191 outputs"),
        (lambda: nn.Linear(WIDTH, 384), "the layer has 384 outputs"),
    ],
)
def test_layers_that_cannot_take_it_are_refused(make: Callable[[], nn.Linear], problem: str) -> None:
    with pytest.raises(TransformError, match=problem):
        fold_inverse(make(), fitted("phi-s"))


def test_replicas_that_do_not_fit_and_unknown_orders_are_refused() -> None:
    with pytest.raises(TransformError, match="384 with 2 replicas; the layer has 192 outputs"):
        fold_inverse(nn.Linear(WIDTH, 192), fitted("phi-s"), replicas=2)
    with pytest.raises(PlanError, match="got 0"):
        fold_inverse(nn.Linear(WIDTH, 192), fitted("phi-s"), replicas=0)
    with pytest.raises(PlanError, match="'pixel'"):
        fold_inverse(nn.Linear(WIDTH, 192), fitted("phi-s"), 1, "pixel")  # type: ignore[arg-type]
