"""The source open_clip against open_clip itself; run by test_libraries.py where open_clip is installed.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from statsvc.errors import PlanError
from statsvc.plan import Teacher
from tests.support.teachers import assert_same, images, load, pixels, resolved_without_torch, snr_of_a_run
from tests.workers.teachers.test_sources_transformers import Trap
from workers.teachers import resolve
from workers.teachers.open_clip import DEFAULTS
from workers.unit.decoders import Decoders

TEXT = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear", "resize_mode": "shortest"}
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "mean of the patches": {"embed_dim": 24, "vision_cfg": {**VIT, "pool_type": "avg"}, "text_cfg": TEXT},
    "custom text": {"embed_dim": 24, "custom_text": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "residual": {
        "embed_dim": 24, "text_cfg": TEXT,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    },
    "timm tower": {
        "embed_dim": 24, "custom_text": True, "text_cfg": TEXT,
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_vit", "timm_model_pretrained": False,
                       "timm_pool": "token", "timm_proj": "linear"},
    },
}  # fmt: skip
CLIPS = [name for name in MODELS if name not in ("timm tower", "residual")]


def size_of(name: str) -> int:
    size: int = MODELS[name]["vision_cfg"]["image_size"]
    return 160 if name == "timm tower" else size


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of the table, laid out as open_clip's on the hub, with random weights."""
    root = tmp_path_factory.mktemp("open_clip")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            (root / name).mkdir()
            model_cfg = json.loads(json.dumps(MODELS[name]))
            model_cfg["vision_cfg"]["image_size"] = size_of(name)
            config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}
            (root / name / "open_clip_config.json").write_text(json.dumps(config))
            torch.manual_seed(0)
            model = open_clip.create_model(f"local-dir:{root / name}", load_weights=False)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.05 * torch.randn_like(weight))
            tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(tensors, root / name / "open_clip_model.safetensors")
        return root / name

    return folder


@pytest.fixture
def clip(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that a test may change."""
    shutil.copytree(folders("clip"), tmp_path / "clip")
    return tmp_path / "clip"


def oracle(folder: Path, size: int | None = None) -> Any:
    """The model in a folder, by open_clip alone."""
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True, force_image_size=size).eval()


def prepared(model: Any, squares: list[Image.Image]) -> torch.Tensor:
    """Pixels by open_clip's own transform, whose crop cuts nothing off a square."""
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False
    )
    return torch.stack([transform(square) for square in squares])


def tokens_and_features(model: Any, pixels_B3SS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches as open_clip gives them with output_tokens, and the image features."""
    visual = model.visual
    if hasattr(visual, "trunk"):
        features = visual.trunk.forward_features(pixels_B3SS)
        return features[:, visual.trunk.num_prefix_tokens :], model.encode_image(pixels_B3SS)
    if hasattr(visual, "layer4"):
        x = visual.stem(pixels_B3SS)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
        return x.flatten(2).mT, visual(pixels_B3SS)
    visual.output_tokens = True
    pooled, tokens = visual(pixels_B3SS)
    visual.output_tokens = False
    return tokens, pooled


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_patches_and_summary_are_those_of_open_clip_prepared_by_open_clip(
    folders: Callable[[str], Path], name: str
) -> None:
    size = size_of(name)
    model, teacher = oracle(folders(name)), load(source="open_clip", model=str(folders(name)))
    assert teacher.preprocessing.size == size
    given = prepared(model, [Image.fromarray(image) for image in images(size)])
    tokens, pooled = tokens_and_features(model, given)
    found = teacher(images(size))
    # The same operations in the same order, but for the order of division and subtraction in the pixels.
    assert_same(found["patches"], tokens)
    assert_same(found["summary"], pooled[:, None])
    assert_same(found["summary"], model.encode_image(given)[:, None])


@pytest.mark.parametrize("name", ["clip", "timm tower"])
@torch.inference_mode()
def test_another_size_is_the_model_that_open_clip_builds_for_it(folders: Callable[[str], Path], name: str) -> None:
    size = size_of(name) + 32
    model = oracle(folders(name), size)
    tokens, pooled = tokens_and_features(model, pixels(images(size), PREPROCESS["mean"], PREPROCESS["std"]))
    found = load(source="open_clip", model=str(folders(name)), size=size)(images(size))
    assert_same(found["patches"], tokens)
    assert_same(found["summary"], pooled[:, None])


@pytest.mark.parametrize("name", [*CLIPS, "timm tower"])
@torch.inference_mode()
def test_patches_can_be_taken_after_any_block_and_before_the_last_norm(
    folders: Callable[[str], Path], name: str
) -> None:
    model, size = oracle(folders(name)), size_of(name)
    given = pixels(images(size), PREPROCESS["mean"], PREPROCESS["std"])
    maps = model.visual.forward_intermediates(given)["image_intermediates"]
    for block in (0, -1):
        teacher = load(source="open_clip", model=str(folders(name)), taps={"patches": f"block.{block}"})
        assert_same(teacher(images(size))["patches"], maps[block].flatten(2).mT)


@pytest.mark.parametrize("name", CLIPS)
@torch.inference_mode()
def test_the_last_norm_and_the_projection_make_of_block_and_cls_what_open_clip_gives(
    folders: Callable[[str], Path], name: str
) -> None:
    visual, folder = oracle(folders(name)).visual, str(folders(name))
    before = load(source="open_clip", model=folder, taps={"patches": "block.-1", "summary": "cls"})(images(32))
    after = load(source="open_clip", model=folder)(images(32))
    assert_same(visual.ln_post(before["patches"]), after["patches"])
    if name != "mean of the patches":
        assert_same(before["summary"] @ visual.proj, after["summary"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"taps": {"patches": "block.9"}}, "not all to be had of this model"),
        ({"taps": {"patches": "last_hidden_state"}}, r"taps\.patches: 'last_hidden_state' is not tokens or block\.N"),
        ({"taps": {"summary": "pooled"}}, r"taps\.summary: 'pooled' is not one of image_features, cls"),
        ({"options": {"seed": 1}}, r"options\.seed means nothing to the source open_clip"),
        ({"model": "ViT-B-32"}, r"options\.pretrained: None is wrong; the architecture 'ViT-B-32' needs the tag"),
        ({"model": "ViT-B-32", "options": {"pretrained": "x"}}, "has no weights 'x' of it; .* may be: openai, "),
        ({"model": "./nowhere"}, r"no folder './nowhere'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(clip: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load(**{"source": "open_clip", "model": str(clip), **keys})


def test_the_weights_of_a_tag_lie_where_open_clip_says() -> None:
    # Without a network they are not to be had, and the message names what was looked for.
    plan = Teacher(source="open_clip", model="ViT-H-14-378-quickgelu", options={"pretrained": "dfn5b"})
    with pytest.raises(PlanError, match="hf download apple/DFN5B-CLIP-ViT-H-14-378`"):
        resolve("x", plan)


@torch.inference_mode()
def test_a_tag_is_the_named_architecture_with_the_weights_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--timm--vit_base_patch32_clip_224.openai/snapshots" / ("0123" * 10)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123" * 10)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, snapshot / "open_clip_model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    teacher = load(source="open_clip", model="ViT-B-32-quickgelu", options={"pretrained": "openai"})
    cfg = open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")
    tokens, pooled = tokens_and_features(model, pixels(images(224, 1), cfg["mean"], cfg["std"]))
    assert_same(teacher(images(224, 1))["patches"], tokens)
    assert_same(teacher(images(224, 1))["summary"], pooled[:, None])
    with pytest.raises(PlanError, match="'openai' were trained with another GELU; with -quickgelu at the end"):
        resolve("x", Teacher(source="open_clip", model="ViT-B-32", options={"pretrained": "openai"}))
    shutil.rmtree(snapshot)  # the smallest architecture of the table takes 600 MB


def test_the_defaults_are_those_of_open_clip(clip: Path) -> None:
    cfg = open_clip.transform.PreprocessCfg()
    assert {key: getattr(cfg, key) for key in DEFAULTS} == DEFAULTS
    config = json.loads((clip / "open_clip_config.json").read_text())
    del config["preprocess_cfg"]
    (clip / "open_clip_config.json").write_text(json.dumps(config))
    found = resolve("x", Teacher(source="open_clip", model=str(clip))).preprocessing
    assert {key: getattr(found, key) for key in DEFAULTS} == DEFAULTS


def test_the_digest_is_of_the_tower_and_the_weights(clip: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return resolve("x", Teacher(source="open_clip", model=str(folder))).weights

    first = digest(clip)
    assert first == resolved_without_torch(source="open_clip", model=str(clip))
    assert digest(shutil.copytree(clip, tmp_path / "copy")) == first
    config = json.loads((clip / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "copy/open_clip_config.json").write_text(json.dumps(config))
    assert digest(tmp_path / "copy") != first
    tensors = load_file(clip / "open_clip_model.safetensors")
    tensors["visual.ln_post.weight"][0] += 1
    save_file(tensors, clip / "open_clip_model.safetensors")
    assert digest(clip) != first


@torch.inference_mode()
def test_the_weights_of_older_repositories_are_read_but_never_unpickled(clip: Path, tmp_path: Path) -> None:
    before = load(source="open_clip", model=str(clip))(images(32))
    tensors = load_file(clip / "open_clip_model.safetensors")
    torch.save(tensors, clip / "open_clip_pytorch_model.bin")
    (clip / "open_clip_model.safetensors").unlink()
    assert_same(load(source="open_clip", model=str(clip))(images(32))["patches"], before["patches"])
    (clip / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(PlanError, match="cannot be loaded by open_clip"):
        load(source="open_clip", model=str(clip))
    assert not (tmp_path / "sprung").exists()


def test_a_missing_weight_or_none_at_all_is_refused(clip: Path) -> None:
    tensors = load_file(clip / "open_clip_model.safetensors")
    del tensors["visual.proj"]
    save_file(tensors, clip / "open_clip_model.safetensors")
    with pytest.raises(PlanError, match="cannot be loaded by open_clip"):
        load(source="open_clip", model=str(clip))
    (clip / "open_clip_model.safetensors").unlink()
    with pytest.raises(PlanError, match=r"holds none of open_clip_model\.safetensors"):
        load(source="open_clip", model=str(clip))


@pytest.mark.parametrize("name", ["clip", "quickgelu", "timm tower"])
def test_int8_targets_of_a_run_give_back_open_clips_own_features(
    folders: Callable[[str], Path], name: str, tmp_path: Path, decoders: Decoders
) -> None:
    model = oracle(folders(name))

    @torch.inference_mode()
    def features(squares: list[Image.Image]) -> dict[str, torch.Tensor]:
        tokens, pooled = tokens_and_features(model, prepared(model, squares))
        return {"patches": tokens, "summary": pooled[:, None]}

    found = snr_of_a_run(tmp_path, decoders, {"source": "open_clip", "model": str(folders(name))}, features)
    assert np.min(list(found.values())) >= 40
