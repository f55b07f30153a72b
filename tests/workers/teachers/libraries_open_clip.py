"""The source open_clip against open_clip itself; run by test_libraries.py where open_clip is installed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from statsvc.plan import Teacher
from tests.contracts.teacher import Build, Oracle, TeacherContract
from tests.support.checkpoints import Trap, change_weights, edit, hub_snapshot, shake
from tests.support.refusals import refuses
from tests.support.teachers import Features, Keys, assert_same, digest, images, load, pixels
from workers.teachers import resolve
from workers.teachers.open_clip import DEFAULTS

WEIGHTS = "open_clip_model.safetensors"
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
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The folder of a model of the table, laid out as open_clip's on the hub, with random weights."""
    root = tmp_path_factory.mktemp("open_clip")

    def built(name: str) -> Keys:
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            model_cfg = {**MODELS[name], "vision_cfg": {**MODELS[name]["vision_cfg"], "image_size": size_of(name)}}
            config = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}
            (folder / "open_clip_config.json").write_text(json.dumps(config))
            torch.manual_seed(0)
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
            shake(model)
            tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(tensors, folder / WEIGHTS)
        return {"source": "open_clip", "model": str(folder)}

    return built


def model_in(folder: str, size: int | None = None) -> Any:
    """By open_clip alone."""
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True, force_image_size=size).eval()


@pytest.fixture
def oracle(build: Build) -> Oracle:
    def features(name: str, squares: list[Image.Image], size: int | None = None, taps: Keys | None = None) -> Features:
        model = model_in(build(name)["model"], size)
        given = prepared(model, squares)
        tokens, pooled = tokens_and_features(model, given)
        assert_same(pooled.float(), model.encode_image(given).float())
        if (tap := (taps or {}).get("patches") or "").startswith("block."):
            maps = model.visual.forward_intermediates(given)["image_intermediates"]
            tokens = maps[int(tap.removeprefix("block."))].flatten(2).mT
        return {"patches": tokens, "summary": pooled[:, None]}

    return features


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


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    """Weights as older repositories have them, and a trap in them."""
    no_weights(folder)
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Trap(folder.parent / "sprung")))


class TestOpenClip(TeacherContract):
    # The same operations in the same order, but for the order of division and subtraction in the pixels.
    CASES = {  # noqa: RUF012 (literal tables)
        **{name: (name, {}) for name in MODELS},
        **{f"{name} at another size": (name, {"size": size_of(name) + 32}) for name in ("clip", "timm tower")},
        **{
            f"{name} after block {block}": (name, {"taps": {"patches": f"block.{block}"}})
            for name in [*CLIPS, "timm tower"] for block in (0, -1)
        },
    }  # fmt: skip
    MODEL, WEIGHTS, RUNS = "clip", WEIGHTS, ("clip", "quickgelu", "timm tower")
    REFUSED = [  # noqa: RUF012
        ("clip", {"taps": {"patches": "block.9"}}, "...not all to be had of this model..."),
        ("clip", {"taps": {"patches": "last_hidden_state"}},
         "...taps.patches: 'last_hidden_state' is not tokens or block.N..."),
        ("clip", {"taps": {"summary": "pooled"}}, "...taps.summary: 'pooled' is not one of image_features, cls..."),
        ("clip", {"options": {"seed": 1}}, "...options.seed means nothing to the source open_clip..."),
        ("clip", {"model": "ViT-B-32"},
         "...options.pretrained: None is wrong; the architecture 'ViT-B-32' needs the tag..."),
        ("clip", {"model": "ViT-B-32", "options": {"pretrained": "x"}},
         "...has no weights 'x' of it; ... may be: openai, ..."),
        ("clip", {"model": "./nowhere"}, "...no folder './nowhere'..."),
        # Weights of a tag lie where open_clip says. Without a network they are not to be had.
        ("clip", {"model": "ViT-H-14-378-quickgelu", "options": {"pretrained": "dfn5b"}},
         "...hf download apple/DFN5B-CLIP-ViT-H-14-378`..."),
    ]  # fmt: skip
    UNRESOLVED = {  # noqa: RUF012
        "no weights": (no_weights, f"...holds none of {WEIGHTS}..."),
    }
    UNLOADABLE = {  # noqa: RUF012
        "a missing weight": (
            lambda folder: change_weights(folder / WEIGHTS, "visual.proj"), "...cannot be loaded by open_clip..."
        ),
        "a pickle": (pickled, "...cannot be loaded by open_clip..."),
    }  # fmt: skip


@pytest.mark.parametrize("name", CLIPS)
@torch.inference_mode()
def test_last_norm_and_projection_of_block_and_cls_are_the_outputs(build: Build, name: str) -> None:
    keys = build(name)
    visual = model_in(keys["model"]).visual
    before = load(**keys, taps={"patches": "block.-1", "summary": "cls"})(images(32))
    after = load(**keys)(images(32))
    assert_same(visual.ln_post(before["patches"]), after["patches"])
    if name != "mean of the patches":
        assert_same(before["summary"] @ visual.proj, after["summary"])


@torch.inference_mode()
def test_tag_is_the_named_architecture_with_cached_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_snapshot(tmp_path, "timm/vit_base_patch32_clip_224.openai")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, snapshot / WEIGHTS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    teacher = load(source="open_clip", model="ViT-B-32-quickgelu", options={"pretrained": "openai"})
    cfg = open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")
    tokens, pooled = tokens_and_features(model, pixels(images(224, 1), cfg["mean"], cfg["std"]))
    assert_same(teacher(images(224, 1))["patches"], tokens)
    assert_same(teacher(images(224, 1))["summary"], pooled[:, None])
    sentence = "...'openai' were trained with another GELU; with -quickgelu at the end..."
    refuses(sentence, digest, source="open_clip", model="ViT-B-32", options={"pretrained": "openai"})
    shutil.rmtree(snapshot)  # the smallest architecture of the table takes 600 MB


@pytest.fixture
def clip(build: Build, tmp_path: Path) -> Keys:
    """A model whose folder a test may change."""
    keys = build("clip")
    return {**keys, "model": str(shutil.copytree(keys["model"], tmp_path / "clip"))}


def test_defaults_are_those_of_open_clip(clip: Keys) -> None:
    cfg = open_clip.transform.PreprocessCfg()
    assert {key: getattr(cfg, key) for key in DEFAULTS} == DEFAULTS
    file = Path(clip["model"]) / "open_clip_config.json"
    config = json.loads(file.read_text())
    del config["preprocess_cfg"]
    file.write_text(json.dumps(config))
    found = resolve("x", Teacher(**clip)).preprocessing
    assert {key: getattr(found, key) for key in DEFAULTS} == DEFAULTS


def test_digest_is_of_the_tower_too(clip: Keys) -> None:
    first, file = digest(**clip), Path(clip["model"]) / "open_clip_config.json"
    edit(file, model_cfg={**json.loads(file.read_text())["model_cfg"], "quick_gelu": True})
    assert digest(**clip) != first


@torch.inference_mode()
def test_weights_of_older_repositories_are_read_too(clip: Keys) -> None:
    before, folder = load(**clip)(images(32)), Path(clip["model"])
    torch.save(load_file(folder / WEIGHTS), folder / "open_clip_pytorch_model.bin")
    no_weights(folder)
    assert_same(load(**clip)(images(32))["patches"], before["patches"])
