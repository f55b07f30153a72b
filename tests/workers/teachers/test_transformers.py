"""The source transformers against transformers itself: one checkpoint folder, loaded twice, gives the same features.

Suffixes: B = images, T = tokens, D = channels.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from pydantic import ValidationError

from statsvc.plan import Teacher
from tests.contracts.teacher import Build, Oracle, TeacherContract
from tests.support.checkpoints import DINO, GIVEN, SAM, SMALL, Trap, change_weights, edit, flip, save_checkpoint
from tests.support.refusals import refuses
from tests.support.teachers import Features, Keys, assert_same, digest, images, load, pixels, pixels_of
from workers.teachers import SOURCES, resolve

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PROMPT = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
MASK = {
    "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "num_hidden_layers": 1
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32, "patch_size": 4}
WHOLE_SAM = {"vision_config": SAM, "prompt_encoder_config": PROMPT, "mask_decoder_config": MASK}

# The architecture and its configuration; CLS and register tokens before the patches; which part is the vision tower.
ARCHITECTURES: dict[str, tuple[str, Keys, int, str]] = {
    "dinov2": ("dinov2", DINO, 1, ""),
    "dinov2 with registers": ("dinov2_with_registers", {**DINO, "num_register_tokens": 4}, 5, ""),
    "dinov3": ("dinov3_vit", {**SMALL, "num_register_tokens": 4}, 5, ""),
    "vit": ("vit", SMALL, 1, ""),
    "clip vision": ("clip_vision_model", SMALL, 1, ""),
    "clip": ("clip", {"vision_config": SMALL, "text_config": TEXT, "projection_dim": 16}, 1, "vision_model"),
    "siglip vision": ("siglip_vision_model", SMALL, 0, ""),
    "siglip": ("siglip", {"vision_config": SMALL, "text_config": TEXT}, 0, "vision_model"),
    "sam vision": ("sam_vision_model", SAM, 0, ""),
    "sam": ("sam", WHOLE_SAM, 0, "vision_encoder"),
    "swin": ("swin", SWIN, 0, ""),
    "convnext": ("convnext", CONVNEXT, 0, ""),
}
CHANGES_SIZE = ["dinov2", "dinov2 with registers", "dinov3", "vit", "clip vision", "clip", "siglip vision", "siglip"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    root = tmp_path_factory.mktemp("architectures")

    def built(name: str) -> Keys:
        folder = root / name
        if not folder.exists():
            save_checkpoint(folder, *ARCHITECTURES[name][:2])
        return {"source": "transformers", "model": str(folder), **GIVEN}

    return built


@pytest.fixture
def oracle(build: Build) -> Oracle:
    def features(name: str, squares: list[Image.Image], size: int = 32, taps: Any = None) -> Features:
        return plain_features(Path(build(name)["model"]), name, pixels_of(squares, {**GIVEN, "size": size}), taps or {})

    return features


@torch.inference_mode()
def plain_features(folder: Path, name: str, pixels_B3SS: torch.Tensor, taps: dict[str, Any]) -> Features:
    """What the model in the folder says, by transformers alone."""
    _, _, before, tower = ARCHITECTURES[name]
    auto_model: Any = transformers.AutoModel
    model = auto_model.from_pretrained(folder, dtype=torch.float32).eval()
    # DINO interpolates its positions anyway; the others must be told.
    other = pixels_B3SS.shape[-1] != 32 and not name.startswith("dino")
    arguments = {"interpolate_pos_encoding": True} if other else {}
    said = (getattr(model, tower) if tower else model)(pixels_B3SS, output_hidden_states=True, **arguments)
    if name.startswith("dino"):  # as the README has it, its summary is the CLS token
        assert_same(said.pooler_output, said.last_hidden_state[:, 0])
    patches, summary = taps.get("patches", "last_hidden_state"), taps.get("summary", "pooler_output")
    found = {}
    if patches is not None:
        hidden = said.last_hidden_state
        if patches.startswith("hidden_states."):
            hidden = said.hidden_states[int(patches.removeprefix("hidden_states."))]
        tokens = hidden.flatten(2).mT if hidden.ndim == 4 else hidden
        found["patches"] = tokens[:, before:]
    if summary is not None and not name.startswith("sam"):  # SAM has neither a pooler nor a CLS token
        found["summary"] = said.last_hidden_state[:, :1] if summary == "cls" else said.pooler_output[:, None]
    return found


def only(name: str) -> Any:
    """Another file, which nobody may open, in the place of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Trap(folder.parent / "sprung")))

    return change


def replaced(name: str, content: bytes | None) -> Any:
    """Another content of a file, or none."""

    def change(folder: Path) -> None:
        if "index" in name:
            (folder / "model.safetensors").unlink()
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def names_other_weights(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")


ONLY_SAFETENSORS = "...model.safetensors is missing; weights are read from safetensors files only..."
CANNOT = "...cannot be loaded by transformers..."


class TestTransformers(TeacherContract):
    CASES = {  # noqa: RUF012 (literal tables)
        **{name: (name, {}) for name in ARCHITECTURES},
        **{f"{name} at 48": (name, {"size": 48}) for name in CHANGES_SIZE},
        **{f"hidden state {n}": ("dinov2", {"taps": {"patches": f"hidden_states.{n}"}}) for n in range(-3, 3)},
        **{f"CLS of {name}": (name, {"taps": {"summary": "cls"}}) for name in ("clip vision", "dinov2 with registers")},
        **{f"no {output}": ("dinov2", {"taps": {output: None}}) for output in ("patches", "summary")},
    }
    MODEL, WEIGHTS, RUNS = "dinov2", "model.safetensors", ("dinov2",)
    REFUSED = [  # noqa: RUF012
        ("dinov2", {"taps": {"patches": "last_layer"}},
         "teachers.teacher...'last_layer' is not an output...last_hidden_state, pooler_output..."),
        ("dinov2", {"taps": {"patches": "hidden_states.3"}},
         "teachers.teacher...'hidden_states.3' is outside of the model's 3 hidden states..."),
        ("dinov2", {"taps": {"patches": "hidden_states.-4"}},
         "teachers.teacher...outside of the model's 3 hidden states..."),
        ("dinov2", {"taps": {"patches": "hidden_states"}}, "teachers.teacher...'hidden_states' is not an output..."),
        ("dinov2", {"taps": {"summary": "pooled"}},
         "teachers.teacher...'pooled' is not an output...pooler_output, cls..."),
        ("siglip vision", {"taps": {"summary": "cls"}}, "teachers.teacher...'cls' ...no CLS token..."),
        ("sam vision", {"taps": {"summary": "pooler_output"}},
         "teachers.teacher...'pooler_output' is not an output...last_hidden_state..."),
        ("sam vision", {"taps": {"patches": None}}, "teachers.teacher...has none of..."),
        ("sam vision", {"size": 48}, "teachers.teacher: the model cannot take images of size 48: ..."),
        ("dinov2", {"size": 7}, "teachers.teacher: the model cannot take images of size 7: ..."),
        ("siglip vision", {"size": 3}, "teachers.teacher: the model cannot take images of size 3: ..."),
        ("dinov2", {"options": {"seed": 1}},
         "...teachers.teacher.options: {'seed': 1} means nothing to the source..."),
        ("dinov2", {"source": "transformer"},
         "...'transformer' is not one of transformers, ...did you mean 'transformers'..."),
    ]  # fmt: skip
    UNRESOLVED = {  # noqa: RUF012
        "no config": (replaced("config.json", None), "...has no config.json; save it with save_pretrained..."),
        "config cut off": (replaced("config.json", b"{"), "...config.json is not readable JSON..."),
        "config a list": (replaced("config.json", b"[]"), "...config.json is not a JSON object..."),
        "config empty": (replaced("config.json", b"{}"), "...config.json ...model_type..."),
        "preprocessor cut off": (
            replaced("preprocessor_config.json", b"{"), "...preprocessor_config.json is not readable JSON...",
        ),
        "index empty": (
            replaced("model.safetensors.index.json", b"{}"), "...model.safetensors.index.json ...weight_map...",
        ),
        "other weights named": (names_other_weights, "...transformers_weights...other.safetensors..."),
        "no weights": (replaced("model.safetensors", None), ONLY_SAFETENSORS),
        **{
            f"only {name}": (only(name), ONLY_SAFETENSORS)
            for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")
        },
    }  # fmt: skip
    UNLOADABLE = {  # noqa: RUF012
        "missing": (
            lambda folder: change_weights(
                folder / "model.safetensors", "encoder.layer.1.mlp.fc1.weight", "encoder.layer.1.mlp.fc1.bias"
            ),
            "...lacks 2 weights ...first: encoder.layer.1.mlp.fc1.bias...",
        ),
        "another shape": (
            lambda folder: change_weights(folder / "model.safetensors", layernorm__weight=torch.ones(31)), CANNOT,
        ),
        **{
            f"{len(content)} bytes": (replaced("model.safetensors", content), CANNOT)
            for content in (b"", b"\0" * 100, b"not safetensors at all")
        },
        "unknown architecture": (
            lambda folder: edit(folder / "config.json", model_type="vit-of-next-year"),
            "...cannot be loaded by transformers: ...vit-of-next-year...",
        ),
    }  # fmt: skip


def test_only_patches_and_summary_can_be_tapped() -> None:
    with pytest.raises(ValidationError, match="registers"):
        Teacher.model_validate({"source": "transformers", "model": "x", "taps": {"registers": "cls"}})
    assert "transformers" in SOURCES


@pytest.mark.parametrize("name", ["clip", "siglip", "sam"])
def test_multimodal_folder_is_prepared_like_its_vision_tower(build: Build, name: str) -> None:
    asked = [Teacher(source="transformers", model=build(part)["model"]) for part in (name, f"{name} vision")]
    whole, tower = (resolve("x", plan).preprocessing for plan in asked)
    assert whole == tower


# --- weights ---


@pytest.fixture
def dino(build: Build, tmp_path: Path) -> Keys:
    """A Dinov2 whose folder a test may change."""
    return copy_of(build("dinov2"), tmp_path / "dinov2")


def copy_of(keys: Keys, folder: Path) -> Keys:
    return {**keys, "model": str(shutil.copytree(keys["model"], folder))}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_run_in_the_precision_of_the_plan(
    build: Build, tmp_path: Path, stored: torch.dtype
) -> None:
    auto_model: Any = transformers.AutoModel
    auto_model.from_pretrained(build("dinov2")["model"]).to(stored).save_pretrained(tmp_path)
    expected = plain_features(tmp_path, "dinov2", pixels(images(32), GIVEN["mean"], GIVEN["std"]), {})
    assert_same(load(**build("dinov2") | {"model": str(tmp_path)})(images(32))["patches"], expected["patches"])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("clip", "vision_model.post_layernorm.weight"),
        ("siglip", "vision_model.encoder.layers.0.layer_norm1.weight"),
        ("sam", "vision_encoder.pos_embed"),
    ],
)
def test_missing_weight_of_the_vision_tower_is_refused(build: Build, tmp_path: Path, name: str, missing: str) -> None:
    keys = copy_of(build(name), tmp_path / "model")
    change_weights(tmp_path / "model/model.safetensors", missing)
    refuses("...lacks 1 weights...", load, **keys)


def test_rest_of_a_multimodal_model_may_lack_weights(build: Build, tmp_path: Path) -> None:
    keys = copy_of(build("clip"), tmp_path / "model")
    before = load(**keys)(images(32))
    missing = ("text_model.final_layer_norm.weight", "visual_projection.weight", "logit_scale")
    change_weights(tmp_path / "model/model.safetensors", *missing)
    assert_same(load(**keys)(images(32))["summary"], before["summary"])


@pytest.mark.parametrize("missing", [["pooler.dense.weight", "pooler.dense.bias"], ["pooler.dense.bias"]], ids=len)
def test_summary_is_the_cls_token_where_the_pooler_has_no_weights(
    build: Build, oracle: Oracle, tmp_path: Path, missing: list[str]
) -> None:
    keys = copy_of(build("vit"), tmp_path / "model")
    change_weights(tmp_path / "model/model.safetensors", *missing)
    expected = oracle("vit", [Image.fromarray(image) for image in images(32)], taps={"summary": "cls"})
    assert_same(load(**keys)(images(32))["summary"], expected["summary"])
    sentence = "...has no weights for its pooler; use the tap cls..."
    refuses(sentence, load, **keys, taps={"summary": "pooler_output"})


def test_checkpoint_in_parts_is_the_same_model(build: Build, tmp_path: Path) -> None:
    keys, parts = save_in_parts(build("dinov2"), tmp_path)
    assert_same(load(**keys)(images(32))["patches"], load(**build("dinov2"))(images(32))["patches"])
    digests = {digest(**keys)}
    for part in parts:
        flip(part, -1)
        digests.add(digest(**keys))
    assert len(digests) == 1 + len(parts) > 2
    parts[0].unlink()
    refuses(f"...{parts[0].name} is missing...", digest, **keys)


def save_in_parts(keys: Keys, folder: Path) -> tuple[Keys, list[Path]]:
    auto_model: Any = transformers.AutoModel
    auto_model.from_pretrained(keys["model"]).save_pretrained(folder, max_shard_size="30KB")
    return {**keys, "model": str(folder)}, sorted(folder.glob("model-*.safetensors"))


# --- the digest ---


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"a_new_key": 1}], ids=str)
def test_configuration_of_the_model_changes_the_digest(dino: Keys, change: Keys) -> None:
    before = digest(**dino)
    edit(Path(dino["model"]) / "config.json", **change)
    assert digest(**dino) != before


def test_what_changes_no_feature_does_not_change_the_digest(dino: Keys) -> None:
    before, folder = digest(**dino), Path(dino["model"])
    others = {"transformers_version": "9.9", "_name_or_path": "/x", "architectures": ["X"]}
    edit(folder / "config.json", **others, dtype="float16", torch_dtype="float16")
    (folder / "README.md").write_text("words")
    (folder / "preprocessor_config.json").write_text("{}")  # preprocessing stands in the fingerprint by itself
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert digest(**dino) == before


def test_digest_is_of_the_file_that_is_loaded_when_there_are_two(dino: Keys, tmp_path: Path) -> None:
    # A folder with a whole checkpoint and, left over, one in parts.
    save_checkpoint(tmp_path / "other", *ARCHITECTURES["dinov2"][:2], seed=1)
    before, first = load(**dino)(images(32)), digest(**dino)
    save_in_parts({"model": tmp_path / "other"}, tmp_path / "parts")
    for file in (tmp_path / "parts").glob("model*"):
        shutil.copy(file, dino["model"])
    assert torch.equal(load(**dino)(images(32))["patches"], before["patches"])
    assert digest(**dino) == first


# --- nothing is executed ---


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin"])
def test_pickles_beside_the_weights_are_never_opened(dino: Keys, tmp_path: Path, name: str) -> None:
    pickled = Path(dino["model"]) / name
    pickled.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    before = digest(**dino)
    load(**dino)(images(32))
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickled.read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap does work
    pickled.unlink()
    assert digest(**dino) == before


def test_code_of_a_model_runs_only_when_the_plan_says_so(dino: Keys, tmp_path: Path) -> None:
    folder = Path(dino["model"])
    (folder / "mystery.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    code = {"AutoConfig": "mystery.C", "AutoModel": "mystery.M"}
    edit(folder / "config.json", model_type="mystery", auto_map=code)
    refuses(CANNOT, load, **dino)
    assert not (tmp_path / "sprung").exists()
    before = digest(**dino, trust_remote_code=True)
    flip(folder / "mystery.py", 3)
    assert digest(**dino, trust_remote_code=True) != before  # the code decides the numbers, too
    assert not (tmp_path / "sprung").exists()
