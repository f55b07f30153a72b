"""A model that a function of the user's own builds: `model: package.module:function`.

The function is called with the plan's `options` as keyword arguments and gives a torch.nn.Module, or any other
callable, that takes pixels float32 [B, 3, S, S], normalized as the plan says, and returns one of
    {"patches": [B, T, D] or [B, D, rows, columns], "summary": [B, D] or [B, S, D]}; one of the two may be missing,
    and other names are reached by `taps: {patches: theirs}`
    a named tuple, taken by its names, or a tuple, whose values are called "0", "1", ...
    a single tensor: the summary if it is [B, D], else the patches
Patches are tokens of a square grid, rows first, without CLS and registers. Size, interpolation, mean and std stand in
the plan. Naming the function there is the consent to run it: nothing is run but its module, when the teacher is loaded.
Modules are found where Python finds them, and then where the command was started.

The digest, which tells one model from another, is over what decides the numbers as far as it can be seen from outside:
the bytes of the module (of every .py file of its package, if it is in one), the function's name, the options, and
for `options: {weights: FILE OR FOLDER}` the bytes there instead of the path. Other files that the function reads, and
other packages, are not seen: whoever changes those gives the teacher another name.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statsvc.digests import canonical_json, sha256
from statsvc.errors import PlanError
from statsvc.plan import Teacher
from workers.teachers.base import Features, Resolved, chosen_preprocessing, chosen_taps
from workers.teachers.hub import file_digest

if TYPE_CHECKING:
    import torch

TAPS = {"patches": "patches|0", "summary": "summary|1"}  # the first that the model gives, if any


def resolve(name: str, plan: Teacher) -> Resolved:
    """Find and hash the function's source without running it. Raises PlanError."""
    key = f"teachers.{name}"
    module, colon, function = plan.model.partition(":")
    if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise PlanError(f"{key}.model: {plan.model!r} is not package.module:function")
    file = _find(key, module)
    options: dict[str, Any] = dict(plan.options)
    if "weights" in options:
        options["weights"] = _content(key, options["weights"])
    seen = {"function": function, "module": module, "options": options, "sources": _sources(file, module)}
    return Resolved(
        plan=plan,
        weights=sha256(canonical_json(seen)),
        preprocessing=chosen_preprocessing(key, plan, {}, "nothing but the plan"),
        taps=chosen_taps(plan, TAPS),
        location=str(file),
        about={"preprocessing_from": "plan"},
    )


def load(resolved: Resolved) -> Features:
    """Run the function. Raises PlanError for whatever goes wrong in it."""
    from workers.teachers.tokens import named, square_grid

    module, _, function = resolved.plan.model.partition(":")
    file = Path(resolved.location)
    place = str(file.parents[_depth(file, module)])
    if place not in sys.path:
        sys.path.append(place)  # last, so that no file there hides a library
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise PlanError(f"{resolved.plan.model}: the module cannot be imported: {_said(error)}") from error
    if found.__file__ is None or Path(found.__file__).resolve() != file.resolve():
        raise PlanError(f"{resolved.plan.model}: Python imports {found.__file__} instead of {file}; rename it")
    if not callable(build := getattr(found, function, None)):
        raise PlanError(f"{resolved.plan.model}: {found.__file__} has no function {function!r}")
    try:
        model = build(**resolved.plan.options)
    except Exception as error:
        raise PlanError(f"{resolved.plan.model} fails: {_said(error)}") from error
    if not callable(model):
        raise PlanError(f"{resolved.plan.model} gives {type(model).__name__}, which is no model: it cannot be called")

    class Own:
        """A Module is moved and set to evaluation; what any other callable does about that is its own business."""

        def eval(self) -> Own:
            if hasattr(model, "eval"):
                model.eval()
            return self

        def to(self, device: Any) -> Own:
            if hasattr(model, "to"):
                model.to(device)
            return self

        def __call__(self, pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
            return named(model(pixels_B3SS), resolved.taps)

        def grid(self, tokens: int) -> tuple[int, int]:
            return square_grid(tokens)

    return Own()


def _find(key: str, module: str) -> Path:
    """The module's file. Nothing is imported: not even the packages it is in."""
    here, parts = str(Path.cwd()), module.split(".")
    for place in (*sys.path, here):
        search: list[str] = [place or here]
        spec: ModuleSpec | None = None
        for depth in range(len(parts)):
            spec = PathFinder.find_spec(".".join(parts[: depth + 1]), search)
            if spec is None:
                break
            search = list(spec.submodule_search_locations or ())
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            return Path(spec.origin)
    raise PlanError(f"{key}.model: no module {module!r} in {here} or where Python looks; set PYTHONPATH or install it")


def _depth(file: Path, module: str) -> int:
    """How many folders of packages the file is in."""
    return module.count(".") + (file.name == "__init__.py")


def _sources(file: Path, module: str) -> list[list[str]]:
    """The module, or every source of its whole package."""
    depth = _depth(file, module)
    return _digests(file.parents[depth - 1], "*.py") if depth else [["", file_digest(file).hex()]]


def _content(key: str, given: Any) -> list[list[str]]:
    place = Path(str(given)).expanduser()
    if place.is_file():
        return [["", file_digest(place).hex()]]
    if not (digests := _digests(place, "*")):
        raise PlanError(f"{key}.options.weights: {given!r} is no file and no folder with files")
    return digests


def _digests(folder: Path, pattern: str) -> list[list[str]]:
    """Names in a folder and digests of what they hold."""
    files = sorted(file for file in folder.rglob(pattern) if file.is_file())
    return [[file.relative_to(folder).as_posix(), file_digest(file).hex()] for file in files]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
