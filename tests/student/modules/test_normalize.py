"""Normalize, Denormalize and decode against the float64 transform, the limits that were promised, and the codecs.

Suffixes: N = feature vectors, D = channels of the teacher, k = channels of a target, B = rows, T = tokens,
H = rows of the grid, W = columns of the grid.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from statsvc.errors import PlanError, TransformError
from statsvc.numerics.codec import CODECS
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import METHODS, fit
from statsvc.numerics.transform import Transform
from statsvc.student.modules.decode import decode
from statsvc.student.modules.normalize import Denormalize, Normalize
from tests.support.features import TEACHERS, teacher_features
from tests.support.libraries import cuda

WHITENING = ("pca", "zca", "hca")
# Hadamard matrices exist for the first only; 190 is built from the minor of a larger one.
WIDTHS = (192, 190)
each_device = pytest.mark.parametrize(
    "put", [pytest.param(torch.from_numpy, id="cpu"), pytest.param(cuda, id="cuda", marks=pytest.mark.gpu)]
)


@cache
def features(teacher: str, dim: int) -> NDArray[np.float32]:
    return teacher_features(teacher, 3 * dim, dim)


@cache
def fitted(method: str, teacher: str = "sam", dim: int = 192, rank: int | None = None) -> Transform:
    # Gains of up to 1000, the most that the defaults let pass: these features reach them.
    return fit(Moments.of(features(teacher, dim)), method, rank=rank, eigenvalue_floor=1e-6)


def stds(teacher: str, dim: int) -> NDArray[np.float64]:
    deviations: NDArray[np.float64] = features(teacher, dim).astype(np.float64).std(axis=0)
    return deviations


# Numbers


@each_device
@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("method", METHODS)
def test_there_and_back_features_move_by_a_tiny_part_of_their_deviation(
    method: str, teacher: str, dim: int, put: Callable[[NDArray[Any]], torch.Tensor]
) -> None:
    x_ND, transform = put(features(teacher, dim)), fitted(method, teacher, dim)
    there, back = Normalize(transform).to(x_ND.device), Denormalize(transform).to(x_ND.device)
    error_ND = (back(there(x_ND)) - x_ND).double().cpu().numpy() / stds(teacher, dim)
    # The limits that statsvc promises; measured 1.4e-5 and 8.5e-5 at most, up to 1280 channels.
    assert np.abs(error_ND).max() <= (1e-3 if method in WHITENING else 5e-5)


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("method", METHODS)
def test_each_direction_is_the_float64_transform_within_the_bound_of_its_sums(
    method: str, teacher: str, dim: int
) -> None:
    x_ND, transform, half_ulp = features(teacher, dim).astype(np.float64), fitted(method, teacher, dim), 2.0**-24
    y_Nk = transform.apply(x_ND)
    said_Nk = Normalize(transform)(torch.from_numpy(features(teacher, dim))).double().numpy()
    # n + 2 roundings of n terms; beside them the mean's own, which is half an ulp of the mean.
    bound_Nk = (dim + 2) * half_ulp * (np.abs(x_ND - transform.mean) @ np.abs(transform.matrix).T)
    bound_Nk += half_ulp * np.abs(transform.matrix) @ np.abs(transform.mean)
    assert np.all(np.abs(said_Nk - y_Nk) <= bound_Nk)
    back_ND = Denormalize(transform)(torch.from_numpy(y_Nk.astype(np.float32))).double().numpy()
    bound_ND = (dim + 4) * half_ulp * (np.abs(y_Nk) @ np.abs(transform.inverse).T + np.abs(transform.mean))
    assert np.all(np.abs(back_ND - x_ND) <= bound_ND)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_with_a_rank_there_and_back_is_the_projection_on_the_directions_kept(teacher: str) -> None:
    x_ND, transform = features(teacher, 192), fitted("phi-s", teacher, 192, 48)
    y_Nk = Normalize(transform)(torch.from_numpy(x_ND))
    assert y_Nk.shape[1] == 48
    projection_DD = transform.inverse @ transform.matrix
    expected_ND = (x_ND - transform.mean) @ projection_DD.T + transform.mean
    error_ND = (Denormalize(transform)(y_Nk).double().numpy() - expected_ND) / stds(teacher, 192)
    assert np.abs(error_ND).max() <= 5e-5
    assert np.abs((x_ND - expected_ND) / stds(teacher, 192)).max() > 0.1  # it is a projection, and not the identity


@pytest.mark.parametrize("module", [Normalize, Denormalize])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 5), (2, 1, 3, 2)])
def test_channels_are_the_last_axis(module: type[nn.Module], shape: tuple[int, ...]) -> None:
    map_ = module(fitted("phi-s", dim=12, rank=7))
    width = 12 if module is Normalize else 7
    x = torch.randn(*shape, width)
    expected = torch.stack([map_(row) for row in x.reshape(-1, width)]) if x.numel() else torch.empty(0)
    assert map_(x).shape == (*shape, 19 - width)
    assert torch.allclose(map_(x).flatten(), expected.flatten(), atol=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [12, 5])
def test_with_four_axes_channels_are_the_second_also_where_the_last_would_fit(
    side: int, memory_format: torch.memory_format
) -> None:
    normalize, denormalize = Normalize(fitted("phi-s", dim=12)), Denormalize(fitted("phi-s", dim=12))
    x_BDHW = torch.randn(2, 12, 3, side).to(memory_format=memory_format)
    tokens_BTD = x_BDHW.flatten(2).mT
    y_BDHW = normalize(x_BDHW)
    assert torch.allclose(y_BDHW.flatten(2).mT, normalize(tokens_BTD), atol=1e-5)
    assert torch.allclose(denormalize(y_BDHW), x_BDHW, atol=1e-3)


# Precision


@pytest.mark.parametrize("module", [Normalize, Denormalize])
def test_autocast_changes_no_bit(module: type[nn.Module]) -> None:
    map_, x_ND = module(fitted("phi-s")), torch.from_numpy(features("sam", 192))
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        under_ND = map_(x_ND)
    assert under_ND.dtype == torch.float32
    assert torch.equal(under_ND, map_(x_ND))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_of_every_dtype_is_computed_in_float32(dtype: torch.dtype) -> None:
    normalize, x_ND = Normalize(fitted("phi-s")), torch.from_numpy(features("sam", 192)).to(dtype)
    assert normalize(x_ND).dtype == torch.float32
    assert torch.equal(normalize(x_ND), normalize(x_ND.float()))


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.float16),
        lambda model: model.to("cpu", torch.bfloat16),
    ],
)
def test_casting_the_model_around_them_leaves_their_numbers(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(192, 192), Normalize(fitted("phi-s")), Denormalize(fitted("phi-s")))
    before = copy.deepcopy(model.state_dict())
    after = cast(model).state_dict()
    assert after["0.weight"].dtype != torch.float32
    for name in ("1.mean", "1.matrix", "2.mean", "2.inverse", "1.transform_digest"):
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])


@pytest.mark.gpu
def test_casting_and_moving_at_once_leaves_their_numbers() -> None:
    moved = Normalize(fitted("phi-s")).to("cuda", torch.bfloat16)
    assert (moved.matrix.device.type, moved.matrix.dtype) == ("cuda", torch.float32)
    assert torch.equal(moved.matrix.cpu(), Normalize(fitted("phi-s")).matrix)


@pytest.mark.parametrize("module", [Normalize, Denormalize])
def test_gradients_are_those_of_the_matrix(module: type[nn.Module]) -> None:
    transform = fitted("phi-s", dim=12, rank=7)
    matrix_oi = transform.matrix if module is Normalize else transform.inverse
    x_Ni = torch.randn(5, matrix_oi.shape[1], requires_grad=True)
    module(transform)(x_Ni).sum().backward()
    assert x_Ni.grad is not None
    assert np.allclose(x_Ni.grad, matrix_oi.sum(axis=0), rtol=1e-5, atol=1e-5 * np.abs(matrix_oi).max())


# Digests


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def through_safetensors(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = safetensors.torch.load(safetensors.torch.save(state))
    return loaded


each_file = pytest.mark.parametrize("saved", [through_torch, through_safetensors])


def model(transform: Transform) -> nn.Module:
    return nn.ModuleDict({"teacher": Normalize(transform), "head": Denormalize(transform)})


@each_file
def test_a_state_dict_loads_into_modules_of_the_same_transform(saved: Callable[..., dict[str, Any]]) -> None:
    source, target = model(fitted("phi-s")), model(fitted("phi-s"))
    for buffer in target.buffers():
        if buffer.dtype == torch.float32:
            buffer.zero_()
    target.load_state_dict(saved(source.state_dict()))
    for name, array in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], array)


@each_file
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_of_another_fit_is_refused_and_changes_nothing(
    strict: bool, saved: Callable[..., dict[str, Any]]
) -> None:
    mine, other = fitted("phi-s"), fitted("phi-s", "siglip")
    target = Normalize(mine)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(TransformError) as error:
        target.load_state_dict(saved(Normalize(other).state_dict()), strict=strict)
    assert mine.digest in str(error.value)
    assert f'store.transform("{other.digest}")' in str(error.value)
    for name, array in before.items():
        assert torch.equal(target.state_dict()[name], array)
    with pytest.raises(TransformError, match=other.digest):
        model(mine).load_state_dict(saved(model(other).state_dict()), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_numbers_without_a_digest_are_refused(strict: bool) -> None:
    state = Denormalize(fitted("phi-s")).state_dict()
    del state["transform_digest"]
    with pytest.raises(TransformError, match=r"mean, inverse\) without it"):
        Denormalize(fitted("phi-s")).load_state_dict(state, strict=strict)


def test_rounded_numbers_are_refused() -> None:
    state = {name: array.half() if array.is_floating_point() else array for name, array in
             model(fitted("phi-s")).state_dict().items()}  # fmt: skip
    with pytest.raises(TransformError, match=r"mean rounded to torch\.float16"):
        model(fitted("phi-s")).load_state_dict(state)


def test_a_state_dict_that_says_nothing_of_them_leaves_them_as_they_are() -> None:
    target = Normalize(fitted("phi-s"))
    target.load_state_dict({}, strict=False)
    assert torch.equal(target.matrix, torch.tensor(fitted("phi-s").matrix, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})


def test_the_state_of_one_direction_does_not_fit_the_other() -> None:
    with pytest.raises(RuntimeError, match="inverse"):
        Denormalize(fitted("phi-s")).load_state_dict(Normalize(fitted("phi-s")).state_dict())


def test_a_model_made_without_memory_gets_its_numbers_from_the_state_dict() -> None:
    with torch.device("meta"):
        empty = model(fitted("phi-s"))
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model(fitted("phi-s")).state_dict())
    with pytest.raises(TransformError, match="must not be mixed"):
        filled.load_state_dict(model(fitted("global")).state_dict())
    assert torch.equal(filled.state_dict()["head.inverse"], Denormalize(fitted("phi-s")).inverse)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_compute_the_same_and_refuse_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    source, x_ND = Normalize(fitted("phi-s")), torch.from_numpy(features("sam", 192)[:4])
    twin = copied(source)
    assert torch.equal(twin(x_ND), source(x_ND))
    with pytest.raises(TransformError):
        twin.load_state_dict(Normalize(fitted("global")).state_dict())


def test_printed_modules_say_which_transform_they_are() -> None:
    transform = fitted("phi-s", dim=12, rank=7)
    assert repr(Normalize(transform)) == f"Normalize(phi-s, 12 -> 7, digest={transform.digest[:12]})"
    assert repr(Denormalize(transform)) == f"Denormalize(phi-s, 7 -> 12, digest={transform.digest[:12]})"


# Refusals


@pytest.mark.parametrize("shape", [(), (1,), (7,), (12, 3), (2, 3, 5, 12), (2, 1, 3, 3)])
def test_other_widths_are_refused_also_those_that_would_be_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(TransformError, match=r"Normalize of this phi-s transform takes \[..., 12\]"):
        Normalize(fitted("phi-s", dim=12))(torch.ones(shape))


def test_codes_are_refused() -> None:
    with pytest.raises(TransformError, match=r"got torch\.int8: decode them first"):
        Denormalize(fitted("phi-s", dim=12))(torch.ones(2, 12, dtype=torch.int8))


# Codes


def encoded(dtype: str, k: int) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float32]]:
    """Codes and scales of tokens decades apart, and what the readers decode from them."""
    y_BTk = np.random.default_rng(k).standard_normal((3, 8, k)) * np.geomspace(1e-6, 1e6, 8)[:, None]
    stored = CODECS[dtype].encode(y_BTk.astype(np.float32))
    decoded: NDArray[np.float32] = CODECS[dtype].decode(stored, k)
    return torch.from_numpy(stored["codes"]), torch.from_numpy(stored["scales"]), decoded


@pytest.mark.parametrize("k", [1, 2, 33, 192])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_decode_to_the_bits_that_readers_give(dtype: str, k: int) -> None:
    codes, scales_BT, expected_BTk = encoded(dtype, k)
    kept = codes.clone()
    with torch.autocast("cpu", torch.bfloat16):
        decoded_BTk = decode(codes, scales_BT, k)
    assert decoded_BTk.dtype == torch.float32
    assert np.array_equal(decoded_BTk.numpy().view(np.uint32), expected_BTk.view(np.uint32))
    assert torch.equal(codes, kept)


def test_every_nibble_decodes_to_its_own_number() -> None:
    codes_BTh = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1)
    decoded_Tk = decode(codes_BTh, torch.ones(1, 256))[0]
    for byte in range(256):
        signed = [nibble - 16 * (nibble > 7) for nibble in (byte & 15, byte >> 4)]
        assert decoded_Tk[byte].tolist() == signed


def test_k_is_needed_for_odd_int4_targets_only() -> None:
    codes, scales_BT, expected_BTk = encoded("int4", 192)
    assert np.array_equal(decode(codes, scales_BT), expected_BTk)
    codes, scales_BT, expected_BTk = encoded("int4", 33)
    assert decode(codes, scales_BT).shape[-1] == 34
    assert np.array_equal(decode(codes, scales_BT)[..., :33], expected_BTk)
    codes, scales_BT, expected_BTk = encoded("int8", 33)
    assert np.array_equal(decode(codes, scales_BT), expected_BTk)


@pytest.mark.parametrize(
    ("codes", "scales", "k", "problem"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3), None, r"got torch\.float32: float targets need no decoding"),
        (torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(2, 1), None, r"\(2, 3\) for these codes; got .* \(2, 1\)"),
        (torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(2, 3).half(), None, r"got torch\.float16"),
        (torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(2, 3), 5, r"do not hold 5 channels"),
        (torch.ones(2, 3, 4, dtype=torch.uint8), torch.ones(2, 3), 6, r"do not hold 6 channels"),
        (torch.ones(2, 3, 4, dtype=torch.uint8), torch.ones(2, 3), 9, r"do not hold 9 channels"),
    ],
)
def test_codes_and_scales_that_do_not_belong_together_are_refused(
    codes: torch.Tensor, scales: torch.Tensor, k: int | None, problem: str
) -> None:
    with pytest.raises(PlanError, match=problem):
        decode(codes, scales, k)


# One graph


def test_all_of_it_compiles_to_one_graph_without_a_break() -> None:
    """So nothing in it looks at a number of the device, either: that would break the graph."""
    normalize, denormalize = Normalize(fitted("phi-s", dim=12)), Denormalize(fitted("phi-s", dim=12))
    codes, scales_BT, _ = encoded("int4", 12)

    def step(codes: torch.Tensor, scales_BT: torch.Tensor) -> torch.Tensor:
        back: torch.Tensor = normalize(denormalize(decode(codes, scales_BT)))
        return back

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(codes, scales_BT), step(codes, scales_BT))
