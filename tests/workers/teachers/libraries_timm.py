"""The source timm against timm itself; run by test_libraries.py where timm is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from statsvc.plan import Teacher
from tests.contracts.teacher import Build, Oracle, TeacherContract
from tests.support.checkpoints import change_weights, edit, hub_snapshot, shake
from tests.support.teachers import Features, Keys, assert_same, digest, images, kept, load, pixels
from workers.teachers import resolve
from workers.teachers.timm import DEFAULTS

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


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The folder of a model of the table, written by timm."""
    root = tmp_path_factory.mktemp("timm")

    def built(name: str) -> Keys:
        if not (root / name).exists():
            architecture, arguments, size, _ = MODELS[name]
            torch.manual_seed(0)
            model = timm.create_model(architecture, **arguments).eval()
            shake(model)
            model.pretrained_cfg["input_size"] = (3, size, size)
            timm.models.save_for_hf(model, str(root / name), safe_serialization=True)
        return {"source": "timm", "model": str(root / name)}

    return built


def prepared(model: Any, squares: list[Image.Image], size: int) -> torch.Tensor:
    """Pixels by timm's own transform. With crop_pct it would cut a border, which a shared view does not have."""
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**{**config, "crop_pct": 1.0, "input_size": (3, size, size)})
    return torch.stack([transform(square) for square in squares])


@pytest.fixture
def oracle(build: Build) -> Oracle:
    """The model in a folder, by timm alone."""

    def features(
        name: str, squares: list[Image.Image], size: int = 0, pad: int = 0, taps: Keys | None = None
    ) -> Features:
        _, _, own_size, form = MODELS[name]
        size, taps = size or own_size, taps or {}
        fixed = size != own_size and not pad and name not in ("convnext", "any size")
        arguments = {"img_size": size} if fixed else {}
        model = timm.create_model(f"local-dir:{build(name)['model']}", pretrained=True, **arguments).eval()
        given = prepared(model, squares, size)
        if pad:
            given = torch.nn.functional.pad(given, (0, pad - size, 0, pad - size))
        x = model.forward_features(given)
        if (tap := taps.get("patches") or "").startswith("block."):
            maps = model.forward_intermediates(given, intermediates_only=True)
            patches = maps[int(tap.removeprefix("block."))].flatten(2).mT
        elif form == "NCHW":
            rows = x.shape[2] * size // (pad or size)
            patches = x[:, :, :rows, :rows].flatten(2).mT
        else:
            patches = x.flatten(1, 2) if form == "NHWC" else x[:, model.num_prefix_tokens :]
        if taps.get("summary") == "cls":
            summary = x[:, :1]
        else:
            head = taps.get("summary") == "head"
            summary = (model(given) if head else model.forward_head(x, pre_logits=True))[:, None]
        return kept({"patches": patches, "summary": summary}, taps)

    return features


def no_safetensors(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


class TestTimm(TeacherContract):
    # timm divides by 255 and normalizes in the same order in float32, so only roundings of the same size differ.
    CASES = {  # noqa: RUF012 (literal tables)
        **{name: (name, {}) for name in MODELS},
        **{
            f"{name} at another size": (name, {"size": MODELS[name][2] + 32})
            for name in ("vit", "registers", "siglip", "clip", "dinov3", "any size", "convnext", "swin")
        },
        **{
            f"{name} after block {block}": (name, {"taps": {"patches": f"block.{block}"}})
            for name in ("vit", "registers", "dinov3", "convnext", "swin") for block in (0, 1, -1)
        },
        "the CLS token alone": ("clip", {"taps": {"summary": "cls", "patches": None}}),
        "what the head makes of it": ("clip", {"taps": {"summary": "head"}}),
        "a view on a canvas": ("sam", {"size": 32, "pad": 64, "taps": {"summary": None}}),
    }  # fmt: skip
    MODEL, WEIGHTS, RUNS = "vit", "model.safetensors", ("vit", "siglip", "sam", "convnext")
    REFUSED = [  # noqa: RUF012
        ("vit", {"taps": {"patches": "block.9"}}, "...taps.patches: 'block.9' is not to be had..."),
        ("vit", {"taps": {"patches": "tokens"}}, "...taps.patches: 'tokens' is not forward_features or block.N..."),
        ("vit", {"taps": {"summary": "pooled"}}, "...taps.summary: 'pooled' is not one of pre_logits, cls, head..."),
        ("convnext", {"taps": {"summary": "cls"}}, "...taps.summary: 'cls' is not to be had of this model..."),
        ("vit", {"size": 4}, "...cannot ... images of size 4..."),
        ("any size", {"size": 33}, "...cannot..."),
        ("vit", {"model": "vit_no_such"}, "...'vit_no_such' could not be looked up: ...vit_no_such..."),
        # Weights of a name lie where timm says. Without a network they are not to be had.
        *(
            ("vit", {"model": name}, f"...`hf download {repository}`...")
            for name, repository in (
                ("vit_so400m_patch14_siglip_384", "timm/vit_so400m_patch14_siglip_384.webli"),
                ("vit_huge_patch14_clip_quickgelu_378.dfn5b", "timm/vit_huge_patch14_clip_378.dfn5b"),
                ("hf-hub:org/name", "org/name"),
            )
        ),
    ]
    UNRESOLVED = {  # noqa: RUF012
        "no safetensors": (
            no_safetensors, "...model.safetensors is missing; weights are read from safetensors files only...",
        ),
    }  # fmt: skip
    UNLOADABLE = {  # noqa: RUF012
        "a missing weight": (
            lambda folder: change_weights(folder / "model.safetensors", "norm.weight"),
            "...cannot be loaded by timm...",
        ),
    }


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


def test_defaults_are_those_of_timm() -> None:
    expected = timm.data.resolve_data_config({}, pretrained_cfg={"a": 1})
    assert {key: expected[key] for key in DEFAULTS} == DEFAULTS


@torch.inference_mode()
def test_name_is_the_model_of_that_name_with_cached_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), hub_snapshot(tmp_path, "timm/test_vit.r160_in1k") / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    larger = timm.create_model("test_vit", img_size=192).eval()
    larger.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), larger))
    for name, asked, expected in (
        ("test_vit", None, model),
        ("test_vit.r160_in1k", None, model),
        ("test_vit", 192, larger),
    ):
        teacher, size = load(source="timm", model=name, size=asked), asked or 160
        assert teacher.preprocessing.size == size
        given = pixels(images(size), model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        assert_same(teacher(images(size))["patches"], expected.forward_features(given)[:, 1:])


def test_architecture_and_nothing_else_of_the_config_changes_the_digest(build: Build, tmp_path: Path) -> None:
    keys = build("vit")
    vit = shutil.copytree(keys["model"], tmp_path / "vit")
    keys, first = {**keys, "model": str(vit)}, digest(**keys)
    edit(vit / "config.json", license="mit", label_names=["a", "b"])
    assert digest(**keys) == first
    arguments = json.loads((vit / "config.json").read_text())["model_args"]
    edit(vit / "config.json", model_args={**arguments, "depth": 2})
    assert digest(**keys) != first
