"""The visual tower of any model of the open_clip library: by architecture, hub repository or local folder.

A folder is laid out as open_clip's own on the hub: open_clip_config.json and open_clip_model.safetensors, or the
open_clip_pytorch_model.bin of older repositories, which is read with weights_only=True. An architecture needs the tag
of its weights, `model: ViT-H-14-378-quickgelu` and `options: {pretrained: dfn5b}`: config, preprocessing and repository
are then those of open_clip's own table, which takes some seconds to ask. Another size than the model's own resamples
its positions as open_clip does it.

Taps of patches, all without CLS:
    tokens          after the last norm (ln_post), where open_clip's own `output_tokens` takes them. The default
    block.N         after the N-th block, before that norm; N may be negative
Taps of the summary:
    image_features  the image's vector in the space shared with texts: pooled and projected, not normalized. The default
    cls             the CLS token after the last norm, before the projection
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

TAPS = {"patches": "tokens", "summary": "image_features"}
SUMMARIES = ("image_features", "cls")
CONFIG = "open_clip_config.json"
# In the order in which open_clip prefers them.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
# What open_clip takes where preprocess_cfg is silent.
DEFAULTS: dict[str, Any] = {
    "interpolation": "bicubic",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
# What open_clip's table says of an architecture and a tag, in the layout of open_clip_config.json.
LOOK_UP = """
import json, sys, open_clip
name, tag = sys.argv[1:]
model, weights = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
if model is None or not weights:
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none, is it misspelt?"
    sys.exit(f"open_clip has no weights {tag!r} of it; options.pretrained may be: {tags}")
if weights.get("quick_gelu", False) != model.get("quick_gelu", False):
    sys.exit(f"the weights {tag!r} were trained with another GELU; with -quickgelu at the end of the name, or without")
organization, _, rest = weights.get("hf_hub", "").partition("/")
repository, _, file = rest.partition("/")
if not repository or file:
    sys.exit(f"the weights {tag!r} are not in a hub repository of open_clip's layout")
print(json.dumps({"repository": f"{organization}/{repository}", "model_cfg": model, "preprocess_cfg": weights}))
"""


def resolve(name: str, plan: Teacher) -> Resolved:
    """Find the folder, hash config and weights, and read the preprocessing. Raises PlanError."""
    key = f"teachers.{name}"
    if unknown := [option for option in plan.options if option != "pretrained"]:
        raise PlanError(f"{key}.options.{unknown[0]} means nothing to the source open_clip, which knows pretrained")
    require(key, "open_clip", "open-clip")
    taps = chosen_taps(plan, TAPS)
    _check_taps(key, taps)
    folder, config = _find(key, plan)
    model = config["model_cfg"]
    own = {part: value for part, value in (config.get("preprocess_cfg") or {}).items() if value is not None}
    given = {**DEFAULTS, **own, "size": _size(model)}
    vision = {part: model.get(part) for part in ("embed_dim", "vision_cfg", "quick_gelu", "cast_dtype")}
    return Resolved(
        plan=plan,
        weights=sha256(canonical_json(vision), file_digest(_weights(key, folder))),
        preprocessing=chosen_preprocessing(key, plan, given, f"no config of {plan.model!r}"),
        taps=taps,
        location=str(folder),
        about={"revision": plan.revision or commit_of(folder), "preprocessing_from": "config of open_clip"},
    )


def load(resolved: Resolved) -> Features:
    """The visual tower with all its weights from the file. Raises PlanError."""
    import open_clip

    from workers.teachers.tokens import Taken

    folder, canvas, plan = Path(resolved.location), resolved.preprocessing.canvas, resolved.plan
    by_tag = _is_architecture(plan)
    own_size = _size(open_clip.get_model_config(plan.model) if by_tag else _config(plan.model, folder)["model_cfg"])
    try:
        model = open_clip.create_model(
            plan.model if by_tag else f"local-dir:{folder}",
            pretrained=str(_weights(plan.model, folder)) if by_tag else None,
            force_image_size=canvas if canvas != own_size else None,
            pretrained_text=False,
            require_pretrained=True,
            weights_only=True,
        )
    except Exception as error:  # the library raises whatever it comes across in foreign files
        raise PlanError(f"{plan.model} cannot be loaded by open_clip: {first_line(error)}") from error
    visual = model.visual

    def take(pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        return outputs(visual, resolved.taps, pixels_B3SS)

    return Taken(visual, take)


def outputs(visual: Any, taps: dict[str, str], pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Patches [B, T, D] and summary [B, 1, D] of a visual tower. Raises PlanError for a tap that it does not have."""
    from workers.teachers.tokens import as_patches

    patches = taps.get("patches", TAPS["patches"])
    block = re.fullmatch(r"block\.(-?\d+)", patches)
    index = int(block[1]) if block else -1

    def run(index: int, normalized: bool, prefix: bool = False) -> Any:
        return visual.forward_intermediates(
            pixels_B3SS, indices=[index], normalize_intermediates=normalized, output_extra_tokens=prefix
        )

    try:
        found = run(index, normalized=not block)
        outputs = {}
        if "patches" in taps:
            outputs["patches"] = as_patches(found["image_intermediates"][0])
        if taps.get("summary") == "image_features":
            outputs["summary"] = found["image_features"][:, None]
        elif "summary" in taps:
            outputs["summary"] = run(-1, normalized=True, prefix=True)["image_intermediates_prefix"][0][:, :1]
    except (AttributeError, AssertionError, KeyError) as error:
        raise PlanError(f"taps: {taps} are not all to be had of this model: {error}") from error
    return outputs


def _check_taps(key: str, taps: dict[str, str]) -> None:
    patches, summary = taps.get("patches", TAPS["patches"]), taps.get("summary", TAPS["summary"])
    if patches != TAPS["patches"] and not re.fullmatch(r"block\.-?\d+", patches):
        raise PlanError(f"{key}.taps.patches: {patches!r} is not tokens or block.N")
    if summary not in SUMMARIES:
        raise PlanError(f"{key}.taps.summary: {summary!r} is not one of {', '.join(SUMMARIES)}")


def _find(key: str, plan: Teacher) -> tuple[Path, dict[str, Any]]:
    """The folder with the weights, and the config in the layout of open_clip_config.json."""
    local, tag = Path(plan.model).expanduser(), plan.options.get("pretrained")
    if local.is_dir():
        _weights(key, local)
        return local, _config(key, local)
    if plan.model.startswith((".", "/", "~")) or plan.model.count("/") > 1:
        raise PlanError(
            f"{key}.model: no folder {plan.model!r}; give a local folder, hf-hub:org/name, or an architecture"
        )
    if not _is_architecture(plan):
        repository = plan.model.removeprefix("hf-hub:")
        wanted = [CONFIG, *WEIGHTS]
        folder = snapshot(key, plan, repository, wanted, lambda found: (_config(key, found), _weights(key, found)))
        return folder, _config(key, folder)
    if not isinstance(tag, str):
        raise PlanError(
            f"{key}.options.pretrained: {tag!r} is wrong; the architecture {plan.model!r} needs the tag of its "
            "weights, such as dfn5b; or give a local folder or hf-hub:org/name"
        )
    config = json.loads(ask(key, LOOK_UP, plan.model, tag))
    return snapshot(key, plan, config["repository"], [*WEIGHTS], lambda found: _weights(key, found)), config


def _is_architecture(plan: Teacher) -> bool:
    return "/" not in plan.model and not Path(plan.model).is_dir()


def _weights(key: str, folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise PlanError(f"{key}.model: {folder} holds none of {', '.join(WEIGHTS)}, which are the weights of open_clip")


def _config(key: str, folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        raise PlanError(
            f"{key}.model: {folder / CONFIG} has no model_cfg with a vision_cfg; open_clip did not write it"
        )
    return config


def _size(model: dict[str, Any]) -> Any:
    size = model["vision_cfg"].get("image_size", 224)
    return size[0] if isinstance(size, list) else size
