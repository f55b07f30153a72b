"""Any vision model of the transformers library, by hub name or local folder.

Taps: `last_hidden_state`, `hidden_states.N` (N may be negative), `pooler_output`, `cls`; `a|b` takes the first that
the model has. Patches are the last grid rows x grid columns tokens, so CLS and registers drop out by themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from statsvc.digests import canonical_json, sha256
from statsvc.errors import PlanError
from statsvc.plan import Teacher
from workers.teachers.base import Features, Preprocessing, Resolved, chosen_preprocessing, chosen_taps
from workers.teachers.hub import commit_of, file_digest, first_line, read_json, snapshot

if TYPE_CHECKING:
    from workers.teachers.taps import TappedModel

TAPS = {"patches": "last_hidden_state", "summary": "pooler_output|cls"}
# PIL's numbers, which preprocessor_config.json uses.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# What the published checkpoints of an architecture say in preprocessor_config.json, for folders that lack the file.
BY_ARCHITECTURE = {
    "clip_vision_model": ("bicubic", *CLIP),
    "dinov2": ("bicubic", *IMAGENET),
    "dinov2_with_registers": ("bicubic", *IMAGENET),
    "dinov3_vit": ("bilinear", *IMAGENET),
    "sam_vision_model": ("bilinear", *IMAGENET),
    "siglip2_vision_model": ("bilinear", *HALF),
    "siglip_vision_model": ("bicubic", *HALF),
    "vit": ("bilinear", *HALF),
}
VISION_TOWER = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "sam": "sam_vision_model"}
# Written by the library that saved a model; they do not change what it computes.
VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")


def resolve(name: str, plan: Teacher) -> Resolved:
    """Find the folder, hash config and weights, and read the preprocessing. Raises PlanError."""
    key = f"teachers.{name}"
    if plan.options:
        raise PlanError(f"{key}.options: {plan.options!r} means nothing to the source transformers; remove it")
    folder = _folder(key, plan)
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise PlanError(f"{key}.model: {folder / 'config.json'} has no model_type; transformers did not write it")
    files = _weight_files(key, folder, config)
    if plan.trust_remote_code:
        files += _code(key, folder, config)
    parts = [canonical_json(_lasting(config)), *(file_digest(file) for file in files)]
    preprocessing, origin = _preprocessing(key, plan, folder, config)
    return Resolved(
        plan=plan,
        weights=sha256(*parts),
        preprocessing=preprocessing,
        taps=chosen_taps(plan, TAPS),
        location=str(folder),
        about={"revision": plan.revision or commit_of(folder), "preprocessing_from": origin},
    )


def load(resolved: Resolved) -> Features:
    """The model with all its weights from the files. Raises PlanError where some are missing."""
    import torch
    import transformers

    library_logging: Any = transformers.utils.logging
    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModel.from_pretrained(
            resolved.location,
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
            dtype=torch.float32,  # also of weights stored in less: the plan's precision is that of the forward pass
            trust_remote_code=resolved.plan.trust_remote_code,
        )
    except Exception as error:  # the library raises whatever it comes across in foreign files
        raise PlanError(f"{resolved.plan.model} cannot be loaded by transformers: {first_line(error)}") from error
    return _tapped(model, resolved, {str(name) for name in info["missing_keys"]})


def _tapped(model: Any, resolved: Resolved, missing: set[str]) -> TappedModel:
    from workers.teachers.taps import TappedModel

    tower = getattr(model, "vision_model", None) or getattr(model, "vision_encoder", None)
    if tower is not None and hasattr(model.config, "vision_config"):
        missing = {n.removeprefix("vision_model.") for n in missing if n.startswith("vision_")}
        model = tower
    taps = dict(resolved.taps)
    # A checkpoint without a pooler would get a random one.
    unpooled = {n for n in missing if "pooler" in n}
    if unpooled and "pooler_output" in taps.get("summary", ""):
        if "cls" not in taps["summary"]:
            raise PlanError(f"{resolved.plan.model} has no weights for its pooler; use the tap cls for the summary")
        taps["summary"] = "cls"
    if missing - unpooled:
        raise PlanError(
            f"{resolved.plan.model} lacks {len(missing - unpooled)} weights of its architecture, which would stay "
            f"random (first: {sorted(missing - unpooled)[0]}); give a complete checkpoint"
        )
    return TappedModel(model, taps, resolved.preprocessing.canvas)


def _folder(key: str, plan: Teacher) -> Path:
    local = Path(plan.model).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise PlanError(f"{key}.model: the folder {plan.model!r} has no config.json; save it with save_pretrained")
        return local
    if plan.model.startswith((".", "/", "~")) or plan.model.count("/") != 1:
        raise PlanError(f"{key}.model: no folder {plan.model!r}; give a local folder or a hub name such as org/model")
    wanted = ["*.json", "*.safetensors", *(["*.py"] if plan.trust_remote_code else [])]
    return snapshot(
        key, plan, plan.model, wanted, lambda found: _weight_files(key, found, read_json(found / "config.json"))
    )


def _weight_files(key: str, folder: Path, config: dict[str, Any]) -> list[Path]:
    """The files that transformers would load."""
    other, index = config.get("transformers_weights", "model.safetensors"), folder / "model.safetensors.index.json"
    if other != "model.safetensors":
        raise PlanError(f"{key}.model: transformers_weights in config.json names {other!r}; save the model anew")
    files = [folder / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts:
            raise PlanError(f"{key}.model: {index} has no weight_map; copy it again")
        files = [folder / str(name) for name in sorted(set(parts.values()))]
    for file in files:
        if not file.is_file():
            raise PlanError(f"{key}.model: {file} is missing; weights are read from safetensors files only")
    return files


def _code(key: str, folder: Path, config: dict[str, Any]) -> list[Path]:
    """The Python files that come with a model: they decide the numbers, too."""
    for place in (config.get("auto_map") or {}).values():
        if "--" in str(place):
            raise PlanError(
                f"{key}.model: auto_map in config.json names {place!r}, code of another repository; copy it into the "
                "folder, so that the digest covers it"
            )
    return sorted(folder.glob("*.py"))


def _preprocessing(key: str, plan: Teacher, folder: Path, config: dict[str, Any]) -> tuple[Preprocessing, str]:
    """From the plan, else from the model's own file, else from what its architecture is published with."""
    own: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            own = read_json(folder / name)
            own = own.get("image_processor", own)
            origin = name
            break
    else:
        architecture = VISION_TOWER.get(config["model_type"], config["model_type"])
        origin = f"architecture {architecture}"
        if architecture in BY_ARCHITECTURE:
            interpolation, mean, std = BY_ARCHITECTURE[architecture]
            own = {"resample": interpolation, "image_mean": mean, "image_std": std}
    if own.get("do_normalize") is False:
        own.update(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    scale = 255 * own.get("rescale_factor", 1 / 255) if own.get("do_rescale", True) else 255
    resample = own.get("resample")
    given = {
        "size": _size(own, config),
        "interpolation": next((name for number, name in RESAMPLE.items() if resample in (number, name)), None),
        "mean": _scaled(own.get("image_mean"), scale),
        "std": _scaled(own.get("image_std"), scale),
    }
    giver = f"{plan.model!r} has no preprocessor_config.json that"
    return chosen_preprocessing(key, plan, given, giver, " or the file to the folder"), origin


def _size(own: dict[str, Any], config: dict[str, Any]) -> int | None:
    vision = config.get("vision_config", config)
    for size in (
        own.get("crop_size") if own.get("do_center_crop") else None,
        own.get("size"),
        vision.get("image_size"),
    ):
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge") or size.get("longest_edge")
        if isinstance(size, int):
            return size
    return None


def _scaled(values: Any, scale: float) -> tuple[float, ...] | None:
    """mean and std for pixels in [0, 1], where the file gives them for pixels times another factor."""
    try:
        red, green, blue = (float(v) / scale if abs(scale - 1) > 1e-6 else float(v) for v in values)
    except (TypeError, ValueError):
        return None
    return red, green, blue


def _lasting(config: Any) -> Any:
    """A config without what changes whenever it is saved."""
    if not isinstance(config, dict):
        return config
    return {key: _lasting(value) for key, value in config.items() if key not in VOLATILE}
