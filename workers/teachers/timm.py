"""Any model of the timm library: by its name with or without a tag, by hub repository, or by local folder.

A name is what timm.create_model takes: architecture, preprocessing and the repository of its weights are those of
timm's own table, which takes some seconds to ask; `hf-hub:org/name` does not. A folder or repository is laid out as
timm's own on the hub: config.json and model.safetensors, as `timm.models.save_for_hf(model, folder,
safe_serialization=True)` writes it. Only safetensors are read. Another size than the model's own builds the model for
that size; timm then resamples its positions while it loads.

Taps of patches, all without CLS, registers and other prefix tokens; convolutional maps become rows x columns tokens:
    forward_features   what the model gives before its head, after the last norm. The default
    block.N            after the N-th block of a ViT or stage of a ConvNet, before that norm; N may be negative
Taps of the summary; `a|b` takes the first that the model has:
    pre_logits         what timm pools for the classifier: CLS, a mean, attention pooling; as the model was trained
    cls                the first prefix token of forward_features
    head               what the head makes of pre_logits, such as CLIP's projected embedding
The default is pre_logits|cls.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statsvc.digests import canonical_json, sha256
from statsvc.errors import PlanError
from statsvc.plan import Teacher
from workers.teachers.base import Features, Resolved, chosen_preprocessing, chosen_taps
from workers.teachers.hub import ask, commit_of, file_digest, first_line, read_json, require, snapshot

if TYPE_CHECKING:
    import torch

TAPS = {"patches": "forward_features", "summary": "pre_logits|cls"}
SUMMARIES = ("pre_logits", "cls", "head")
WEIGHTS = "model.safetensors"
# What timm's resolve_data_config takes where a config is silent.
DEFAULTS: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
# What timm's table says of a name. A repository may be another's namesake: quickgelu weights lie beside those without.
LOOK_UP = """
import json, sys, timm
print(json.dumps(timm.get_pretrained_cfg(sys.argv[1], allow_unregistered=False).to_dict()))
"""


def resolve(name: str, plan: Teacher) -> Resolved:
    """Find the folder, hash config and weights, and read the preprocessing. Raises PlanError."""
    key = f"teachers.{name}"
    if plan.options:
        raise PlanError(f"{key}.options: {plan.options!r} means nothing to the source timm; remove it")
    require(key, "timm", "timm")
    taps = chosen_taps(plan, TAPS)
    _check_taps(key, taps)
    folder, config = _find(key, plan)
    given = {**_pretrained(config), "size": _size(config)}
    return Resolved(
        plan=plan,
        weights=sha256(canonical_json(_architecture(config)), file_digest(folder / WEIGHTS)),
        preprocessing=chosen_preprocessing(key, plan, given, f"no config of {plan.model!r}"),
        taps=taps,
        location=str(folder),
        about={"revision": plan.revision or commit_of(folder), "preprocessing_from": "config of timm"},
    )


def load(resolved: Resolved) -> Features:
    """The model with all its weights from the file. Raises PlanError."""
    import timm
    from safetensors.torch import load_file

    from workers.teachers.tokens import Taken

    canvas, folder, plan = resolved.preprocessing.canvas, Path(resolved.location), resolved.plan
    by_name = _is_name(plan)
    config = _named(timm.get_pretrained_cfg(plan.model).to_dict()) if by_name else read_json(folder / "config.json")
    # A model that takes any size has no such argument.
    other = {"img_size": canvas} if canvas != _size(config) and _fixed(config) else {}
    try:
        if by_name:
            weights = {"state_dict": load_file(folder / WEIGHTS)}
            model = timm.create_model(plan.model, pretrained=True, pretrained_cfg_overlay=weights, **other)
        else:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, **other)
    except Exception as error:  # the library raises whatever it comes across in foreign files
        at = f" for images of size {canvas}" if other else ""
        raise PlanError(f"{plan.model} cannot be loaded by timm{at}: {first_line(error)}") from error

    def take(pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        return outputs(model, resolved.taps, pixels_B3SS)

    return Taken(model, take)


def outputs(model: Any, taps: dict[str, str], pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Patches [B, T, D] and summary [B, 1, D] of a timm model. Raises PlanError for a tap that it does not have."""
    from workers.teachers.tokens import as_patches

    found: dict[str, torch.Tensor] = {}
    block = re.fullmatch(r"block\.(-?\d+)", taps.get("patches", ""))
    if block:
        try:
            features, (map_BDHW,) = model.forward_intermediates(pixels_B3SS, indices=[int(block[1])])
        except (AttributeError, AssertionError) as error:
            raise PlanError(f"taps.patches: {block[0]!r} is not to be had of this model: {error}") from error
        found["patches"] = as_patches(map_BDHW)
    else:
        features = model.forward_features(pixels_B3SS)
    prefix = getattr(model, "num_prefix_tokens", 0)
    if "patches" in taps and not block:
        tokens_BTD = as_patches(features, channels_last=str(getattr(model, "output_fmt", "")).endswith("NHWC"))
        found["patches"] = tokens_BTD[:, prefix:]
    for tap in taps.get("summary", "").split("|"):
        vector_BD: torch.Tensor | None = None
        if tap == "cls" and prefix:
            vector_BD = features[:, 0]
        elif tap in ("pre_logits", "head"):
            vector_BD = model.forward_head(features, pre_logits=tap == "pre_logits")
        if vector_BD is not None and vector_BD.ndim == 2:  # a model without pooling gives its tokens as they are
            found["summary"] = vector_BD[:, None]
            break
    else:
        if taps.get("summary") in SUMMARIES:
            raise PlanError(f"taps.summary: {taps['summary']!r} is not to be had of this model, it has no such vector")
    return found


def _check_taps(key: str, taps: dict[str, str]) -> None:
    patches, summary = taps.get("patches", TAPS["patches"]), taps.get("summary", TAPS["summary"])
    if patches != TAPS["patches"] and not re.fullmatch(r"block\.-?\d+", patches):
        raise PlanError(f"{key}.taps.patches: {patches!r} is not forward_features or block.N")
    if unknown := [tap for tap in summary.split("|") if tap not in SUMMARIES]:
        raise PlanError(f"{key}.taps.summary: {unknown[0]!r} is not one of {', '.join(SUMMARIES)}")


def _find(key: str, plan: Teacher) -> tuple[Path, dict[str, Any]]:
    """The folder with the weights, and the config in the layout of timm's config.json."""
    local = Path(plan.model).expanduser()
    if local.is_dir():
        return local, _complete(key, local)
    if plan.model.startswith((".", "/", "~")) or plan.model.count("/") > 1:
        raise PlanError(
            f"{key}.model: no folder {plan.model!r}; give a local folder, a name of timm or hf-hub:org/name"
        )
    if _is_name(plan):
        found = json.loads(ask(key, LOOK_UP, plan.model))
        if not found.get("hf_hub_id"):
            raise PlanError(f"{key}.model: timm names no hub repository for the weights of {plan.model!r}")
        return snapshot(key, plan, found["hf_hub_id"], [WEIGHTS], lambda f: _weights(key, f)), _named(found)
    repository = plan.model.removeprefix("hf-hub:")
    folder = snapshot(key, plan, repository, ["config.json", WEIGHTS], lambda found: _complete(key, found))
    return folder, _complete(key, folder)


def _is_name(plan: Teacher) -> bool:
    return "/" not in plan.model and not Path(plan.model).is_dir()


def _named(pretrained: dict[str, Any]) -> dict[str, Any]:
    return {"architecture": pretrained["architecture"], "pretrained_cfg": pretrained}


def _complete(key: str, folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config.get("architecture"), str):
        raise PlanError(f"{key}.model: {folder / 'config.json'} has no architecture; timm did not write it")
    _weights(key, folder)
    return config


def _weights(key: str, folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        raise PlanError(f"{key}.model: {folder / WEIGHTS} is missing; weights are read from safetensors files only")


def _pretrained(config: dict[str, Any]) -> dict[str, Any]:
    """What timm calls the pretrained config, which older files hold at the top."""
    own = config.get("pretrained_cfg", config)
    return {**DEFAULTS, **{key: value for key, value in own.items() if value}}


def _size(config: dict[str, Any]) -> Any:
    size = (config.get("model_args") or {}).get("img_size") or _pretrained(config)["input_size"]
    return size[-1] if isinstance(size, (list, tuple)) else size


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config decides the features. Preprocessing stands in the fingerprint by itself."""
    own = _pretrained(config)
    return {
        "architecture": config["architecture"],
        "model_args": config.get("model_args") or {},
        "num_classes": config.get("num_classes", own.get("num_classes")),
        "input_size": list(own["input_size"]),
    }


def _fixed(config: dict[str, Any]) -> bool:
    args = config.get("model_args") or {}
    any_size = args.get("dynamic_img_size") or args.get("strict_img_size") is False
    return bool(_pretrained(config).get("fixed_input_size")) and not any_size
