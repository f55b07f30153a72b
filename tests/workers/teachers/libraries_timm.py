"""The source timm against timm itself; run by test_libraries.py where timm is installed.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from statsvc.errors import PlanError
from statsvc.plan import Teacher
from tests.support.teachers import assert_same, images, load, pixels, resolved_without_torch, snr_of_a_run
from workers.teachers import resolve
from workers.teachers.timm import DEFAULTS
from workers.unit.decoders import Decoders

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
# The architecture and its arguments; the model's own size; how it gives its features.
MODELS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "vit": ("vit_tiny_patch16_224", {**VIT, "img_size": 32}, 32, "tokens"),
    "registers": ("vit_small_patch14_reg4_dinov2", {**VIT, "img_size": 32, "init_values": 0.5}, 32, "tokens"),
    "siglip": ("vit_base_patch16_siglip_224", {**VIT, "img_size": 32}, 32, "tokens"),
    "clip": ("vit_base_patch16_clip_224", {**VIT, "img_size": 32, "num_classes": 24}, 32, "tokens"),
    "dinov3": ("vit_small_patch16_dinov3", {**VIT, "img_size": 32}, 32, "tokens"),
    "any size": ("vit_tiny_patch16_224", {**VIT, "img_size": 32, "dynamic_img_size": True}, 32, "tokens"),
    "sam": (
        "samvit_base_patch16",
        {**VIT, "img_size": 64, "window_size": 4, "global_attn_indexes": (2,), "neck_chans": 16}, 64, "NCHW",
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64, "NCHW"),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}, 64,
        "NHWC",
    ),
}  # fmt: skip


def model_of(name: str, **other: Any) -> Any:
    """Random weights, those that begin as zeros or ones too."""
    architecture, arguments, size, _ = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, **{**arguments, **other}).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    model.pretrained_cfg["input_size"] = (3, size, size)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of the table, written by timm when first asked for."""
    root = tmp_path_factory.mktemp("timm")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            model = model_of(name)
            timm.models.save_for_hf(model, str(root / name), safe_serialization=True)
        return root / name

    return folder


@pytest.fixture
def vit(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that a test may change."""
    shutil.copytree(folders("vit"), tmp_path / "vit")
    return tmp_path / "vit"


def oracle(folder: Path, **arguments: Any) -> Any:
    """The model in a folder, by timm alone."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


def prepared(model: Any, squares: list[Image.Image], size: int) -> torch.Tensor:
    """Pixels by timm's own transform. With crop_pct it would cut a border, which a shared view does not have."""
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**{**config, "crop_pct": 1.0, "input_size": (3, size, size)})
    return torch.stack([transform(square) for square in squares])


def patches_of(features: torch.Tensor, model: Any, form: str) -> torch.Tensor:
    if form == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).mT if form == "NCHW" else features[:, model.num_prefix_tokens :]


def at_size(folder: Path, size: int, **keys: Any) -> Any:
    return load(source="timm", model=str(folder), size=size, **keys)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_patches_and_summary_are_those_of_timm_prepared_by_timm(folders: Callable[[str], Path], name: str) -> None:
    size, form = MODELS[name][2:]
    model, teacher = oracle(folders(name)), load(source="timm", model=str(folders(name)))
    assert teacher.preprocessing.size == size
    squares = [Image.fromarray(image) for image in images(size)]
    features = model.forward_features(prepared(model, squares, size))
    found = teacher(images(size))
    # timm divides by 255 and normalizes in the same order in float32, so only roundings of the same size differ.
    assert_same(found["patches"], patches_of(features, model, form))
    assert_same(found["summary"], model.forward_head(features, pre_logits=True)[:, None])
    rows = round(teacher.outputs["patches"].tokens ** 0.5)
    assert teacher.outputs["patches"].grid == (rows, rows)


@pytest.mark.parametrize("name", ["vit", "registers", "siglip", "clip", "dinov3", "any size", "convnext", "swin"])
@torch.inference_mode()
def test_another_size_is_the_model_that_timm_builds_for_it(folders: Callable[[str], Path], name: str) -> None:
    size, form = MODELS[name][2] + 32, MODELS[name][3]
    fixed = name not in ("convnext", "any size")
    model = oracle(folders(name), **({"img_size": size} if fixed else {}))
    features = model.forward_features(pixels(images(size), *mean_std(model)))
    assert_same(at_size(folders(name), size)(images(size))["patches"], patches_of(features, model, form))


def mean_std(model: Any) -> tuple[Any, Any]:
    return model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


@pytest.mark.parametrize("name", ["vit", "registers", "dinov3", "convnext", "swin"])
@torch.inference_mode()
def test_patches_can_be_taken_after_any_block(folders: Callable[[str], Path], name: str) -> None:
    size = MODELS[name][2]
    model = oracle(folders(name))
    maps = model.forward_intermediates(pixels(images(size), *mean_std(model)), intermediates_only=True)
    for block in (0, 1, -1):
        teacher = at_size(folders(name), size, taps={"patches": f"block.{block}"})
        assert_same(teacher(images(size))["patches"], maps[block].flatten(2).mT)
        assert "summary" in teacher.outputs


@torch.inference_mode()
def test_the_summary_can_be_the_cls_token_or_what_the_head_makes_of_it(folders: Callable[[str], Path]) -> None:
    model = oracle(folders("clip"))
    features = model.forward_features(pixels(images(32), *mean_std(model)))
    cls = at_size(folders("clip"), 32, taps={"summary": "cls", "patches": None})(images(32))
    assert set(cls) == {"summary"}
    assert_same(cls["summary"], features[:, :1])
    head = at_size(folders("clip"), 32, taps={"summary": "head"})(images(32))["summary"]
    assert head.shape == (3, 1, 24)
    assert_same(head, model(pixels(images(32), *mean_std(model)))[:, None])


@pytest.mark.parametrize(
    ("name", "taps", "message"),
    [
        ("vit", {"patches": "block.9"}, r"taps\.patches: 'block\.9' is not to be had"),
        ("vit", {"patches": "tokens"}, r"taps\.patches: 'tokens' is not forward_features or block\.N"),
        ("vit", {"summary": "pooled"}, r"taps\.summary: 'pooled' is not one of pre_logits, cls, head"),
        ("convnext", {"summary": "cls"}, r"taps\.summary: 'cls' is not to be had of this model"),
    ],
)
def test_a_tap_that_the_model_does_not_have_is_refused(
    folders: Callable[[str], Path], name: str, taps: dict[str, str], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        at_size(folders(name), MODELS[name][2], taps=taps)


@pytest.mark.parametrize("name", ["vit_base_patch14_dinov2.lvd142m", "vit_so400m_patch14_siglip_384.webli",
                                  "samvit_huge_patch16.sa1b", "vit_base_patch16_clip_224.openai"])  # fmt: skip
def test_preprocessing_is_what_timm_makes_of_the_published_config(name: str, tmp_path: Path) -> None:
    cfg = timm.get_pretrained_cfg(name).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name.split(".")[0], "pretrained_cfg": cfg}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    found = resolve("x", Teacher(source="timm", model=str(tmp_path))).preprocessing
    expected = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
    assert (found.mean, found.std, found.interpolation) == tuple(expected[k] for k in ("mean", "std", "interpolation"))
    assert (3, found.size, found.size) == expected["input_size"]


def test_the_defaults_are_those_of_timm() -> None:
    expected = timm.data.resolve_data_config({}, pretrained_cfg={"a": 1})
    assert {key: expected[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("vit_so400m_patch14_siglip_384", "timm/vit_so400m_patch14_siglip_384.webli"),
        ("vit_huge_patch14_clip_quickgelu_378.dfn5b", "timm/vit_huge_patch14_clip_378.dfn5b"),
        ("hf-hub:org/name", "org/name"),
    ],
)
def test_the_weights_of_a_name_lie_where_timm_says(name: str, repository: str) -> None:
    # Without a network they are not to be had, and the message names what was looked for.
    with pytest.raises(PlanError, match=f"`hf download {re.escape(repository)}`"):
        resolve("x", Teacher(source="timm", model=name))


def test_a_name_that_timm_does_not_know_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'vit_no_such' could not be looked up: .*vit_no_such"):
        resolve("x", Teacher(source="timm", model="vit_no_such"))


@torch.inference_mode()
def test_a_name_is_the_model_of_that_name_with_the_weights_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123" * 10)
    (repository / "snapshots" / ("0123" * 10)).mkdir(parents=True)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), repository / "snapshots" / ("0123" * 10) / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("test_vit", "test_vit.r160_in1k"):
        teacher = load(source="timm", model=name)
        assert teacher.preprocessing.size == 160
        features = model.forward_features(pixels(images(160), *mean_std(model)))
        assert_same(teacher(images(160))["patches"], features[:, 1:])
    larger = timm.create_model("test_vit", img_size=192).eval()
    larger.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), larger))
    features = larger.forward_features(pixels(images(192), *mean_std(model)))
    assert_same(load(source="timm", model="test_vit", size=192)(images(192))["patches"], features[:, 1:])


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_weights_architecture_and_nothing_else_change_the_digest(vit: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return resolve("x", Teacher(source="timm", model=str(folder))).weights

    first = digest(vit)
    assert first == resolved_without_torch(source="timm", model=str(vit))
    assert digest(shutil.copytree(vit, tmp_path / "copy")) == first
    edit(vit, license="mit", label_names=["a", "b"])
    assert digest(vit) == first
    arguments = json.loads((vit / "config.json").read_text())["model_args"]
    edit(vit, model_args={**arguments, "depth": 2})
    assert digest(vit) != first
    edit(vit, model_args=arguments)
    tensors = load_file(vit / "model.safetensors")
    tensors["norm.weight"][0] += 1
    save_file(tensors, vit / "model.safetensors")
    assert digest(vit) != first


def test_a_missing_weight_is_refused_not_drawn_at_random(vit: Path) -> None:
    tensors = load_file(vit / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, vit / "model.safetensors")
    with pytest.raises(PlanError, match="cannot be loaded by timm"):
        at_size(vit, 32)


def test_only_safetensors_are_read(vit: Path) -> None:
    torch.save(load_file(vit / "model.safetensors"), vit / "pytorch_model.bin")
    (vit / "model.safetensors").unlink()
    with pytest.raises(PlanError, match=r"model\.safetensors is missing; weights are read from safetensors files only"):
        at_size(vit, 32)


def test_a_size_that_the_model_cannot_take_is_refused(vit: Path, folders: Callable[[str], Path]) -> None:
    with pytest.raises(PlanError, match=r"cannot be loaded by timm for images of size 4|cannot take images of size 4"):
        at_size(vit, 4)
    with pytest.raises(PlanError, match="cannot"):
        at_size(folders("any size"), 33)


@torch.inference_mode()
def test_a_view_on_a_canvas_keeps_only_its_own_patches(folders: Callable[[str], Path]) -> None:
    model, teacher = oracle(folders("sam")), at_size(folders("sam"), 32, pad=64, taps={"summary": None})
    canvas = torch.zeros(3, 3, 64, 64)
    canvas[:, :, :32, :32] = pixels(images(32), *mean_std(model))
    map_BDRC = model.forward_features(canvas)
    assert teacher.outputs["patches"].grid == (4, 4)
    assert_same(teacher(images(32))["patches"], map_BDRC[:, :, :4, :4].flatten(2).mT)


@pytest.mark.parametrize("name", ["vit", "siglip", "sam", "convnext"])
def test_int8_targets_of_a_run_give_back_timms_own_features(
    folders: Callable[[str], Path], name: str, tmp_path: Path, decoders: Decoders
) -> None:
    size, form = MODELS[name][2:]
    model = oracle(folders(name))

    @torch.inference_mode()
    def features(squares: list[Image.Image]) -> dict[str, torch.Tensor]:
        x = model.forward_features(prepared(model, squares, size))
        return {"patches": patches_of(x, model, form), "summary": model.forward_head(x, pre_logits=True)[:, None]}

    found = snr_of_a_run(tmp_path, decoders, {"source": "timm", "model": str(folders(name))}, features)
    assert np.min(list(found.values())) >= 40
