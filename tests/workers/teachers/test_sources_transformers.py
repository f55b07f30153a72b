"""Teachers against plain transformers: the same checkpoint folder, loaded twice, must give the same features.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from pydantic import ValidationError

from statsvc.errors import PlanError
from statsvc.plan import Teacher
from statsvc.store.layout import Output
from tests.support.teachers import assert_same, images, pixels
from workers.teachers import SOURCES, resolve
from workers.teachers.base import Preprocessing, Resolved
from workers.teachers.transformers import BY_ARCHITECTURE
from workers.unit.loaded_teacher import LoadedTeacher

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
DINO = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
SAM = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [1],
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PROMPT = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
MASK = {
    "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "num_hidden_layers": 1
}  # fmt: skip

Configuration = dict[str, Any]
# The architecture and its configuration; CLS and register tokens before the patches; which part is the vision tower.
ARCHITECTURES: dict[str, tuple[str, Configuration, int, str]] = {
    "dinov2": ("dinov2", DINO, 1, ""),
    "dinov2 with registers": ("dinov2_with_registers", {**DINO, "num_register_tokens": 3}, 4, ""),
    "dinov3": ("dinov3_vit", {**SMALL, "num_register_tokens": 2}, 3, ""),
    "vit": ("vit", SMALL, 1, ""),
    "clip vision": ("clip_vision_model", SMALL, 1, ""),
    "clip": ("clip", {"vision_config": SMALL, "text_config": TEXT, "projection_dim": 16}, 1, "vision_model"),
    "siglip vision": ("siglip_vision_model", SMALL, 0, ""),
    "siglip": ("siglip", {"vision_config": SMALL, "text_config": TEXT}, 0, "vision_model"),
    "sam vision": ("sam_vision_model", SAM, 0, ""),
    "sam": (
        "sam", {"vision_config": SAM, "prompt_encoder_config": PROMPT, "mask_decoder_config": MASK}, 0, "vision_encoder"
    ),
    "swin": (
        "swin", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2],
                 "window_size": 2}, 0, "",
    ),
    "convnext": (
        "convnext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32, "patch_size": 4},
        0, "",
    ),
}  # fmt: skip
# What the folder does not say about preprocessing.
GIVEN: Configuration = {"size": 32, "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
CHANGES_SIZE = ["dinov2", "dinov2 with registers", "dinov3", "vit", "clip vision", "clip", "siglip vision", "siglip"]


def build(folder: Path, architecture: str, configuration: Configuration, seed: int = 0) -> Any:
    """The model that was saved in the folder; every weight is random, also those that begin as zeros or ones."""
    torch.manual_seed(seed)
    auto_model: Any = transformers.AutoModel
    model = auto_model.from_config(transformers.AutoConfig.for_model(architecture, **configuration)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint folder of an architecture of the table, built when first asked for."""
    root, built = tmp_path_factory.mktemp("architectures"), set[str]()

    def folder(name: str) -> Path:
        if name not in built:
            build(root / name, *ARCHITECTURES[name][:2])
            built.add(name)
        return root / name

    return folder


@pytest.fixture
def dino(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Dinov2 folder that a test may change."""
    shutil.copytree(folders("dinov2"), tmp_path / "dinov2")
    return tmp_path / "dinov2"


def plan(model: Path | str, **keys: Any) -> Teacher:
    return Teacher.model_validate({"source": "transformers", "model": str(model), **keys})


def resolved(model: Path | str, **keys: Any) -> Resolved:
    return resolve("dino", plan(model, **keys))


def loaded(model: Path | str, precision: str = "float32", **keys: Any) -> LoadedTeacher:
    return LoadedTeacher("dino", resolved(model, **keys), torch.device("cpu"), precision)


def oracle(folder: Path, tower: str, images_BSS3: np.ndarray, **arguments: Any) -> Any:
    """The output of the vision model in the folder, by transformers alone, for the preprocessing GIVEN."""
    auto_model: Any = transformers.AutoModel
    model = auto_model.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        model = getattr(model, tower) if tower else model
        return model(pixel_values=pixels(images_BSS3, GIVEN["mean"], GIVEN["std"]), **arguments)


def tokens_of(hidden: torch.Tensor, before: int) -> torch.Tensor:
    """[B, T, D] of a hidden state, also of a map [B, D, rows, columns], without the tokens before the patches."""
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    return tokens[:, before:]


# --- features ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patches_and_summary_are_those_of_a_plain_forward_pass(folders: Callable[[str], Path], name: str) -> None:
    _, _, before, tower = ARCHITECTURES[name]
    teacher = loaded(folders(name), **GIVEN)
    found, expected = teacher(images(32)), oracle(folders(name), tower, images(32))
    patches = tokens_of(expected.last_hidden_state, before)
    assert_same(found["patches"], patches)
    assert teacher.outputs["patches"] == Output(16, patches.shape[2], (4, 4))
    if name.startswith("sam"):  # it has neither a pooler nor a CLS token
        assert set(found) == set(teacher.outputs) == {"patches"}
    else:
        assert_same(found["summary"], expected.pooler_output[:, None])
        assert teacher.outputs["summary"] == Output(1, expected.pooler_output.shape[1])


@pytest.mark.parametrize("name", CHANGES_SIZE)
def test_at_another_size_positions_are_interpolated_as_transformers_does_it(
    folders: Callable[[str], Path], name: str
) -> None:
    _, _, before, tower = ARCHITECTURES[name]
    arguments = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
    teacher = loaded(folders(name), **{**GIVEN, "size": 48})
    expected = oracle(folders(name), tower, images(48), **arguments)
    assert teacher.outputs["patches"].grid == (6, 6)
    assert_same(teacher(images(48))["patches"], expected.last_hidden_state[:, before:])
    assert_same(teacher(images(48))["summary"], expected.pooler_output[:, None])


def test_a_batch_gives_what_its_images_give_one_by_one(folders: Callable[[str], Path]) -> None:
    teacher = loaded(folders("dinov2"), **GIVEN)
    together = teacher(images(32, 5))
    for number, image_SS3 in enumerate(images(32, 5)):
        assert_same(teacher(image_SS3[None])["patches"], together["patches"][number : number + 1])


def test_the_same_images_give_the_same_bits_and_no_gradients(folders: Callable[[str], Path]) -> None:
    # Built from a config, a model begins in training mode, where half of this one would be dropped at random.
    dropping = random_teacher(**options(hidden_dropout_prob=0.5, drop_path_rate=0.5))
    for teacher in (loaded(folders("vit"), **GIVEN), dropping):
        first, second = teacher(images(32)), teacher(images(32))
        for output in ("patches", "summary"):
            assert torch.equal(first[output], second[output])
            assert not first[output].requires_grad


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_lower_precision_is_autocast_and_comes_out_as_float32(folders: Callable[[str], Path], precision: str) -> None:
    found = loaded(folders("dinov2"), precision, **GIVEN)(images(32))["patches"]
    with torch.autocast("cpu", getattr(torch, precision)):
        expected = oracle(folders("dinov2"), "", images(32)).last_hidden_state[:, 1:].float()
    assert_same(found, expected)
    full = oracle(folders("dinov2"), "", images(32)).last_hidden_state[:, 1:]
    assert 1e-5 < float((found - full).abs().max() / full.abs().max()) < 0.05


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_still_run_in_the_precision_of_the_plan(
    folders: Callable[[str], Path], tmp_path: Path, stored: torch.dtype
) -> None:
    auto_model: Any = transformers.AutoModel
    auto_model.from_pretrained(folders("dinov2")).to(stored).save_pretrained(tmp_path)
    assert_same(
        loaded(tmp_path, **GIVEN)(images(32))["patches"],
        oracle(tmp_path, "", images(32)).last_hidden_state[:, 1:],
    )


# --- taps ---


def test_patches_can_be_taken_from_any_hidden_state(folders: Callable[[str], Path]) -> None:
    hidden = oracle(folders("dinov2"), "", images(32), output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    for layer in (-3, -2, -1, 0, 1, 2):
        teacher = loaded(folders("dinov2"), taps={"patches": f"hidden_states.{layer}"}, **GIVEN)
        assert_same(teacher(images(32))["patches"], hidden[layer][:, 1:])


def test_the_summary_can_be_the_cls_token(folders: Callable[[str], Path]) -> None:
    for name in ("clip vision", "dinov2 with registers"):
        found = loaded(folders(name), taps={"summary": "cls"}, **GIVEN)(images(32))
        assert_same(found["summary"], oracle(folders(name), "", images(32)).last_hidden_state[:, :1])


@pytest.mark.parametrize(("dropped", "left"), [("summary", "patches"), ("patches", "summary")])
def test_an_output_without_a_tap_is_left_out(folders: Callable[[str], Path], dropped: str, left: str) -> None:
    teacher = loaded(folders("dinov2"), taps={dropped: None}, **GIVEN)
    assert set(teacher(images(32))) == set(teacher.outputs) == {left}


@pytest.mark.parametrize(
    ("name", "taps", "message"),
    [
        ("dinov2", {"patches": "last_layer"}, r"'last_layer' is not an output.*last_hidden_state, pooler_output"),
        ("dinov2", {"patches": "hidden_states.3"}, r"'hidden_states.3' is outside of the model's 3 hidden states"),
        ("dinov2", {"patches": "hidden_states.-4"}, r"outside of the model's 3 hidden states"),
        ("dinov2", {"patches": "hidden_states"}, r"'hidden_states' is not an output"),
        ("dinov2", {"summary": "pooled"}, r"'pooled' is not an output.*pooler_output, cls"),
        ("siglip vision", {"summary": "cls"}, r"'cls' .*no CLS token"),
        ("sam vision", {"summary": "pooler_output"}, r"'pooler_output' is not an output.*last_hidden_state"),
        ("sam vision", {"patches": None}, "has none of"),
    ],
)
def test_a_tap_that_the_model_does_not_have_is_refused_with_those_it_has(
    folders: Callable[[str], Path], name: str, taps: dict[str, str | None], message: str
) -> None:
    with pytest.raises(PlanError, match=rf"teachers\.dino.*{message}"):
        loaded(folders(name), taps=taps, **GIVEN)


def test_only_patches_and_summary_can_be_tapped() -> None:
    with pytest.raises(ValidationError, match="registers"):
        plan("x", taps={"registers": "cls"})


@pytest.mark.parametrize(("name", "size"), [("sam vision", 48), ("dinov2", 7), ("siglip vision", 3)])
def test_a_size_that_the_model_cannot_take_is_refused(folders: Callable[[str], Path], name: str, size: int) -> None:
    with pytest.raises(PlanError, match=rf"teachers\.dino: the model cannot take images of size {size}: "):
        loaded(folders(name), **{**GIVEN, "size": size})


# --- weights ---


def without(folder: Path, *names: str) -> None:
    """Take tensors out of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in names:
        del tensors[name]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def test_a_missing_weight_is_refused_not_drawn_at_random(dino: Path) -> None:
    without(dino, "encoder.layer.1.mlp.fc1.weight", "encoder.layer.1.mlp.fc1.bias")
    with pytest.raises(PlanError, match=r"lacks 2 weights .*first: encoder\.layer\.1\.mlp\.fc1\.bias"):
        loaded(dino, **GIVEN)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("clip", "vision_model.post_layernorm.weight"),
        ("siglip", "vision_model.encoder.layers.0.layer_norm1.weight"),
        ("sam", "vision_encoder.pos_embed"),
    ],
)
def test_a_missing_weight_of_the_vision_tower_is_refused(
    folders: Callable[[str], Path], tmp_path: Path, name: str, missing: str
) -> None:
    shutil.copytree(folders(name), tmp_path / "model")
    without(tmp_path / "model", missing)
    with pytest.raises(PlanError, match="lacks 1 weights"):
        loaded(tmp_path / "model", **GIVEN)


def test_what_the_rest_of_a_multimodal_model_lacks_does_not_matter(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(folders("clip"), tmp_path / "model")
    before = loaded(tmp_path / "model", **GIVEN)(images(32))
    without(tmp_path / "model", "text_model.final_layer_norm.weight", "visual_projection.weight", "logit_scale")
    assert_same(loaded(tmp_path / "model", **GIVEN)(images(32))["summary"], before["summary"])


@pytest.mark.parametrize("missing", [["pooler.dense.weight", "pooler.dense.bias"], ["pooler.dense.bias"]], ids=len)
def test_without_the_weights_of_its_pooler_the_summary_is_the_cls_token(
    folders: Callable[[str], Path], tmp_path: Path, missing: list[str]
) -> None:
    shutil.copytree(folders("vit"), tmp_path / "model")
    without(tmp_path / "model", *missing)
    found = loaded(tmp_path / "model", **GIVEN)(images(32))["summary"]
    assert_same(found, oracle(tmp_path / "model", "", images(32)).last_hidden_state[:, :1])
    with pytest.raises(PlanError, match="has no weights for its pooler; use the tap cls"):
        loaded(tmp_path / "model", taps={"summary": "pooler_output"}, **GIVEN)


def test_weights_of_another_shape_are_refused(dino: Path) -> None:
    file = dino / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["layernorm.weight"] = torch.ones(31)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PlanError, match="cannot be loaded by transformers"):
        loaded(dino, **GIVEN)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not safetensors at all"])
def test_a_file_that_is_no_safetensors_is_refused(dino: Path, content: bytes) -> None:
    (dino / "model.safetensors").write_bytes(content)
    with pytest.raises(PlanError, match="cannot be loaded by transformers"):
        loaded(dino, **GIVEN)


def test_a_checkpoint_in_parts_is_the_same_model(folders: Callable[[str], Path], tmp_path: Path) -> None:
    auto_model: Any = transformers.AutoModel
    model = auto_model.from_pretrained(folders("dinov2"))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    whole = loaded(folders("dinov2"), **GIVEN)(images(32))
    assert_same(loaded(tmp_path, **GIVEN)(images(32))["patches"], whole["patches"])
    before = resolved(tmp_path, **GIVEN).weights
    for part in parts:
        flip(part, -1)
        after = resolved(tmp_path, **GIVEN).weights
        assert after != before
        before = after
    parts[0].unlink()
    with pytest.raises(PlanError, match=rf"{parts[0].name} is missing"):
        resolved(tmp_path, **GIVEN)


# --- the digest ---


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def edit(file: Path, **changes: Any) -> None:
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(document))


def test_a_copy_in_another_folder_has_the_same_digest_and_outputs(dino: Path, tmp_path: Path) -> None:
    shutil.copytree(dino, tmp_path / "elsewhere")
    assert resolved(dino, **GIVEN).weights == resolved(tmp_path / "elsewhere", **GIVEN).weights
    assert len(resolved(dino, **GIVEN).weights) == 64


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.999])
def test_any_byte_of_the_weights_changes_the_digest(dino: Path, place: float) -> None:
    before = resolved(dino, **GIVEN).weights
    flip(dino / "model.safetensors", int((dino / "model.safetensors").stat().st_size * place))
    assert resolved(dino, **GIVEN).weights != before


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"a_new_key": 1}], ids=str)
def test_what_the_configuration_says_of_the_model_changes_the_digest(dino: Path, change: Configuration) -> None:
    before = resolved(dino, **GIVEN).weights
    edit(dino / "config.json", **change)
    assert resolved(dino, **GIVEN).weights != before


def test_what_changes_no_feature_does_not_change_the_digest(dino: Path) -> None:
    before = resolved(dino, **GIVEN).weights
    edit(
        dino / "config.json", transformers_version="9.9", _name_or_path="/x", architectures=["X"], dtype="float16",
        torch_dtype="float16",
    )  # fmt: skip
    (dino / "README.md").write_text("words")
    (dino / "preprocessor_config.json").write_text("{}")  # preprocessing stands in the fingerprint by itself
    config = json.loads((dino / "config.json").read_text())
    (dino / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert resolved(dino, **GIVEN).weights == before


def test_the_digest_is_of_the_file_that_is_loaded_when_there_are_two(dino: Path, tmp_path: Path) -> None:
    # A folder with a whole checkpoint and, left over, one in parts.
    other = build(tmp_path / "other", *ARCHITECTURES["dinov2"][:2], seed=1)
    other.save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    before = loaded(dino, **GIVEN)(images(32))
    digest = resolved(dino, **GIVEN).weights
    for file in (tmp_path / "parts").glob("model*"):
        shutil.copy(file, dino)
    assert torch.equal(loaded(dino, **GIVEN)(images(32))["patches"], before["patches"])
    assert resolved(dino, **GIVEN).weights == digest


def test_a_configuration_that_names_another_weights_file_is_refused(dino: Path, tmp_path: Path) -> None:
    build(tmp_path / "other", *ARCHITECTURES["dinov2"][:2], seed=1)
    shutil.copy(tmp_path / "other/model.safetensors", dino / "other.safetensors")
    edit(dino / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(PlanError, match=r"transformers_weights.*other\.safetensors"):
        resolved(dino, **GIVEN)


# --- nothing is executed ---


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin"])
def test_pickles_beside_the_weights_are_never_opened(dino: Path, tmp_path: Path, name: str) -> None:
    (dino / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    before = resolved(dino, **GIVEN).weights
    loaded(dino, **GIVEN)(images(32))
    assert not (tmp_path / "sprung").exists()
    (dino / name).unlink()
    assert resolved(dino, **GIVEN).weights == before
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # the trap does work


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", None])
def test_a_folder_without_safetensors_is_refused_with_the_rule(dino: Path, tmp_path: Path, name: str | None) -> None:
    (dino / "model.safetensors").unlink()
    if name:
        (dino / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(PlanError, match=r"model\.safetensors is missing; weights are read from safetensors files only"):
        resolved(dino, **GIVEN)
    assert not (tmp_path / "sprung").exists()


def test_code_that_comes_with_a_model_runs_only_when_the_plan_says_so(dino: Path, tmp_path: Path) -> None:
    (dino / "mystery.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    edit(
        dino / "config.json", model_type="mystery", auto_map={"AutoConfig": "mystery.C", "AutoModel": "mystery.M"}
    )  # fmt: skip
    with pytest.raises(PlanError, match="cannot be loaded by transformers"):
        loaded(dino, **GIVEN)
    assert not (tmp_path / "sprung").exists()
    trusting = {**GIVEN, "trust_remote_code": True}
    before = resolved(dino, **trusting).weights
    flip(dino / "mystery.py", 3)
    assert resolved(dino, **trusting).weights != before  # the code decides the numbers, too
    assert not (tmp_path / "sprung").exists()


# --- preprocessing ---

FIRST, SECOND = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"size": 40}, Preprocessing(40, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ({"size": {"height": 40, "width": 40}}, Preprocessing(40, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        (
            {"size": {"longest_edge": 64}, "resample": 2},
            Preprocessing(64, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ),
        (
            {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": True},
            Preprocessing(48, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ),
        (
            {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": False},
            Preprocessing(56, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ),
        ({}, Preprocessing(32, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),  # the size in config.json
        ({"do_normalize": False}, Preprocessing(32, "bicubic", (0, 0, 0), (1, 1, 1))),
        ({"rescale_factor": 1 / 255}, Preprocessing(32, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ({"resample": 0}, Preprocessing(32, "nearest", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ({"resample": 1}, Preprocessing(32, "lanczos", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ({"resample": 4}, Preprocessing(32, "box", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ({"resample": 5}, Preprocessing(32, "hamming", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_preprocessing_is_what_the_models_own_file_says(
    dino: Path, document: Configuration, expected: Preprocessing, file: str
) -> None:
    content = {"resample": 3, "image_mean": FIRST, "image_std": SECOND, **document}
    (dino / file).write_text(json.dumps({"image_processor": content} if file == "processor_config.json" else content))
    found = resolved(dino)
    assert found.preprocessing == expected
    assert found.about["preprocessing_from"] == file


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [58.0, 57.0, 56.0]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 2.0, 3.0]},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"do_normalize": False, "rescale_factor": 2.0},
    ],
    ids=str,
)
def test_pixels_are_those_of_the_image_processor_of_transformers(dino: Path, document: Configuration) -> None:
    content = {"resample": 3, "image_mean": FIRST, "image_std": SECOND, **document}
    (dino / "preprocessor_config.json").write_text(json.dumps(content))
    shown = resolved(dino).preprocessing
    processor = transformers.ViTImageProcessorPil(**content, do_resize=False)
    expected = processor(list(images(32)), return_tensors="np")["pixel_values"]
    found = pixels(images(32), shown.mean, shown.std).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("architecture", sorted(BY_ARCHITECTURE))
def test_without_a_file_the_architecture_says_how_images_are_prepared(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture, "image_size": 32}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    found = resolved(tmp_path)
    interpolation, mean, std = BY_ARCHITECTURE[architecture]
    assert found.preprocessing == Preprocessing(32, interpolation, mean, std)
    assert found.about["preprocessing_from"] == f"architecture {architecture}"


@pytest.mark.parametrize("name", ["clip", "siglip", "sam"])
def test_a_multimodal_folder_is_prepared_like_its_vision_tower(folders: Callable[[str], Path], name: str) -> None:
    assert resolved(folders(name)).preprocessing == resolved(folders(f"{name} vision")).preprocessing


def test_the_clip_and_siglip_constants_are_those_of_transformers() -> None:
    for architecture, processor in (
        ("clip_vision_model", transformers.CLIPImageProcessorPil()),
        ("siglip_vision_model", transformers.SiglipImageProcessorPil(resample=3)),  # as published
        ("vit", transformers.ViTImageProcessorPil()),
        ("sam_vision_model", transformers.SamImageProcessorPil()),
    ):
        interpolation, mean, std = BY_ARCHITECTURE[architecture]
        assert {"bilinear": 2, "bicubic": 3}[interpolation] == processor.resample
        assert (list(mean), list(std)) == (list(processor.image_mean), list(processor.image_std))


def test_the_plan_goes_before_the_files(dino: Path) -> None:
    content = {"resample": 3, "image_mean": FIRST, "image_std": SECOND, "size": 40}
    (dino / "preprocessor_config.json").write_text(json.dumps(content))
    (dino / "processor_config.json").write_text("{}")  # the older name goes first
    own = {"size": 48, "interpolation": "box", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    expected: Configuration = {"size": 40, "interpolation": "bicubic", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert resolved(dino).preprocessing == Preprocessing(**expected)
    for key, value in own.items():
        given = tuple(value) if isinstance(value, list) else value
        assert resolved(dino, **{key: value}).preprocessing == Preprocessing(**{**expected, key: given})


@pytest.mark.parametrize(
    ("document", "missing"),
    [
        ({"resample": 3}, "mean, std"),
        ({"image_mean": FIRST, "image_std": SECOND}, "interpolation"),
        ({"image_mean": FIRST, "image_std": SECOND, "resample": 9}, "interpolation"),
        ({"image_mean": FIRST, "image_std": SECOND, "resample": "bikubic"}, "interpolation"),
        ({"image_mean": FIRST, "image_std": SECOND, "resample": [3]}, "interpolation"),
        ({"image_mean": 0.5, "image_std": [1, 1], "resample": 3}, "mean, std"),
        ({"image_mean": ["a", "b", "c"], "image_std": [0, 1, 1], "resample": 3}, "mean, std"),
        ([], "interpolation, mean, std"),
    ],
    ids=str,
)
def test_what_no_file_says_must_be_in_the_plan(dino: Path, document: Any, missing: str) -> None:
    (dino / "preprocessor_config.json").write_text(json.dumps(document))
    if not isinstance(document, dict):
        with pytest.raises(PlanError, match=r"preprocessor_config\.json is not a JSON object"):
            resolved(dino)
        return
    with pytest.raises(PlanError, match=rf"teachers\.dino: .* gives {missing}; add .* to the plan"):
        resolved(dino)
    assert resolved(dino, **GIVEN).preprocessing == Preprocessing(**GIVEN)


# --- where models are found ---


def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    for model in (f"{tmp_path}/nothing", "./nothing", "~/nothing/at/all", "nothing", "a/b/c"):
        with pytest.raises(PlanError, match=r"teachers\.dino\.model: no folder .*hub name such as org/") as refused:
            resolved(model)
        assert repr(model) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"has no config\.json; save it with save_pretrained"),
        ("config.json", "{", r"config\.json is not readable JSON"),
        ("config.json", "[]", r"config\.json is not a JSON object"),
        ("config.json", "{}", r"config\.json .*model_type"),
        ("preprocessor_config.json", "{", r"preprocessor_config\.json is not readable JSON"),
        ("model.safetensors.index.json", "{}", r"model\.safetensors\.index\.json .*weight_map"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_with_what_is_wrong(
    dino: Path, name: str, content: str | None, message: str
) -> None:
    if "index" in name:
        (dino / "model.safetensors").unlink()
    if content is None:
        (dino / name).unlink()
    else:
        (dino / name).write_text(content)
    with pytest.raises(PlanError, match=message):
        resolved(dino)


def test_an_architecture_that_transformers_does_not_know_is_refused(dino: Path) -> None:
    edit(dino / "config.json", model_type="vit-of-next-year")
    with pytest.raises(PlanError, match=r"cannot be loaded by transformers: .*vit-of-next-year"):
        loaded(dino, **GIVEN)


def test_options_and_unknown_sources_are_refused(dino: Path) -> None:
    with pytest.raises(PlanError, match=r"teachers\.dino\.options: {'seed': 1} means nothing to the source"):
        resolved(dino, options={"seed": 1})
    with pytest.raises(PlanError, match=r"'transformer' is not one of transformers, .*did you mean 'transformers'"):
        resolve("dino", plan(dino, source="transformer"))
    assert "transformers" in SOURCES


REVISION = "0123" * 10
OFFLINE = """
import sys
from statsvc.errors import PlanError
from statsvc.plan import Teacher
from workers.teachers import resolve
for model, revision in (("org/there", None), ("org/there", "0123" * 10), ("org/half", None), ("org/nothing", "abc")):
    try:
        found = resolve("dino", Teacher(source="transformers", model=model, revision=revision))
        print(found.weights, found.about["revision"], found.location)
    except PlanError as error:
        print(error)
assert "torch" not in sys.modules
"""


def test_without_a_network_the_cache_is_used_and_what_it_lacks_is_explained(dino: Path, tmp_path: Path) -> None:
    hub = tmp_path / "home/hub"
    for name, files in {"there": ["config.json", "model.safetensors"], "half": ["config.json"]}.items():
        snapshot = hub / f"models--org--{name}/snapshots/{REVISION}"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs/main").write_text(REVISION)
        for file in files:
            shutil.copy(dino / file, snapshot)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    found = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    expected = f"{resolved(dino).weights} {REVISION} {hub}/models--org--there/snapshots/{REVISION}"
    assert found[:2] == [expected, expected]
    for line, model in zip(found[2:], ("org/half", "org/nothing --revision abc"), strict=True):
        assert line.startswith("teachers.dino.model: 'org/")
        assert f"`hf download {model}`, copy its cache here and set HF_HOME" in line


# --- random weights ---

RANDOM: Configuration = {
    "source": "random-vit", "model": "dinov2", "size": 32, "options": {**DINO, "seed": 3, "scale": 2.5}
}  # fmt: skip


def random_teacher(**changes: Any) -> LoadedTeacher:
    asked = Teacher.model_validate({**RANDOM, **changes})
    return LoadedTeacher("dino", resolve("dino", asked), torch.device("cpu"), "float32")


def options(**changes: Any) -> Configuration:
    return {"options": {**RANDOM["options"], **changes}}


def digest_of_weights() -> str:
    """Over all weights and the digest that stands for them."""
    found = resolve("dino", Teacher.model_validate(RANDOM))
    model: Any = SOURCES["random-vit"].load(found)
    weights = (weight.numpy().tobytes() for _, weight in sorted(model.state_dict().items()))
    return hashlib.sha256(found.weights.encode() + b"".join(weights)).hexdigest()


def test_random_weights_are_the_same_in_every_process() -> None:
    script = (
        "from tests.workers.teachers.test_sources_transformers import digest_of_weights; print(digest_of_weights())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert other.stdout.strip() == digest_of_weights()


def test_random_weights_do_not_depend_on_torchs_own_random_numbers() -> None:
    torch.manual_seed(1)
    first = random_teacher()(images(32))["patches"]
    torch.manual_seed(2)
    assert torch.equal(random_teacher()(images(32))["patches"], first)


def test_another_seed_gives_other_weights_and_another_digest() -> None:
    first, second = random_teacher(), random_teacher(**options(seed=4))
    assert not torch.allclose(first(images(32))["patches"], second(images(32))["patches"], atol=0.1)
    digests = {
        resolve("dino", Teacher.model_validate({**RANDOM, **change})).weights
        for change in ({}, options(seed=4), options(scale=2.0), {"model": "dinov2_with_registers"})
    }
    assert len(digests) == 4


def test_the_scale_multiplies_every_output() -> None:
    one = random_teacher(**options(scale=1))(images(32))
    for scale in (2.5, 100, -1):
        scaled = random_teacher(**options(scale=scale))(images(32))
        for output in ("patches", "summary"):
            torch.testing.assert_close(scaled[output], one[output] * scale, rtol=1e-6, atol=0)


def test_random_features_differ_in_scale_between_channels_as_those_of_trained_teachers_do() -> None:
    std_D = random_teacher()(images(32, 16))["patches"].flatten(0, 1).std(0)
    assert float(std_D.max() / std_D.min()) > 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": None}, r"teachers\.dino\.size is missing"),
        ({"model": "no-such-architecture"}, "'no-such-architecture' .* is no architecture of transformers"),
        (options(seed=-1), r"options\.seed: -1 is wrong"),
        (options(seed=1.5), r"options\.seed: 1\.5 is wrong"),
        (options(seed=True), r"options\.seed: True is wrong"),
        (options(scale="large"), r"options\.scale: 'large' is wrong"),
        (options(scale=0), r"options\.scale: 0 is wrong"),
        (options(scale=True), r"options\.scale: True is wrong"),
        (options(hiden_size=32), r"options\.hiden_size .*did you mean 'hidden_size'"),
        (options(hidden_act="round"), "'dinov2' with .* is no architecture of transformers"),
        ({"size": 5}, "cannot take images of size 5"),
    ],
    ids=str,
)
def test_wrong_options_of_random_weights_are_refused(changes: Configuration, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        random_teacher(**changes)
