"""A model in a file: an exported program (`torch.export.save`, .pt2) or TorchScript (`torch.jit.save`, .pt).

    scene: {source: export, model: scene.pt2, size: 224, interpolation: bicubic, mean: [...], std: [...],
            trust_remote_code: true}

The file is a program. Loading an exported program unpickles parts of it, which can run anything, and TorchScript can
write files; so the plan must say `trust_remote_code: true`, for files of one's own too. The digest is over its bytes.

The program takes pixels float32 [B, 3, S, S], normalized as the plan says, and gives what a function of the source
`python` may give: a mapping or named tuple with `patches` and `summary`, a tuple of the two, or a single tensor; other
names by `taps`. A program exported for batches of a fixed size, or a range of sizes, gets such batches: longer ones are
cut, shorter ones are filled up with copies of their last image, whose outputs are dropped. TorchScript does not tell:
`options: {batch_size: 8}` says it. Export models in evaluation mode; how they compute is settled by then.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statsvc.digests import canonical_json, sha256
from statsvc.errors import PlanError
from statsvc.plan import Teacher
from workers.teachers.base import Features, Resolved, chosen_preprocessing, chosen_taps
from workers.teachers.hub import file_digest, first_line

if TYPE_CHECKING:
    import torch

TAPS = {"patches": "patches|0", "summary": "summary|1"}  # the first that the program gives, if any


def resolve(name: str, plan: Teacher) -> Resolved:
    """Find and hash the file without loading it. Raises PlanError."""
    key = f"teachers.{name}"
    if unknown := [option for option in plan.options if option != "batch_size"]:
        raise PlanError(f"{key}.options.{unknown[0]} means nothing to the source export, which knows batch_size")
    batch_size = plan.options.get("batch_size", 1)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise PlanError(f"{key}.options.batch_size: {batch_size!r} is wrong; it must be a whole number from 1")
    file = Path(plan.model).expanduser()
    if not file.is_file():
        raise PlanError(f"{key}.model: no file {plan.model!r}; save one with torch.export.save or torch.jit.save")
    _kind(key, file)
    if not plan.trust_remote_code:
        raise PlanError(
            f"{key}.trust_remote_code: {plan.model!r} is a program, and loading it can run any code in it; if you know "
            "where it comes from, set trust_remote_code: true"
        )
    return Resolved(
        plan=plan,
        weights=sha256(canonical_json(plan.options), file_digest(file)),
        preprocessing=chosen_preprocessing(key, plan, {}, "nothing but the plan"),
        taps=chosen_taps(plan, TAPS),
        location=str(file),
        about={"preprocessing_from": "plan"},
    )


def load(resolved: Resolved) -> Features:
    """The program on the CPU. Raises PlanError."""
    import torch

    from workers.teachers.tokens import named, square_grid

    file = Path(resolved.location)
    exported = _kind(resolved.plan.model, file) == "export"
    program: Any
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch deprecates TorchScript; its files are still there
        try:
            load_file: Any = torch.export.load if exported else torch.jit.load
            program = load_file(str(file)) if exported else load_file(str(file), map_location="cpu")
        except Exception as error:  # a foreign file fails in whatever way it does
            raise PlanError(f"{resolved.plan.model} cannot be loaded by torch: {first_line(error)}") from error
    fixed = resolved.plan.options.get("batch_size")
    least, most = (int(fixed), int(fixed)) if fixed else _batches(program) if exported else (1, None)

    class Program:
        """Not a Module: the module of an exported program refuses eval(), and moves by a pass over its graph."""

        def __init__(self) -> None:
            self._run: Callable[..., Any] = program.module() if exported else program.eval()

        def eval(self) -> Program:
            return self

        def to(self, device: Any) -> Program:
            if exported:
                from torch.export.passes import move_to_device_pass

                # Devices also stand in the graph, as arguments of its operators.
                self._run = move_to_device_pass(program, str(device)).module()
            else:
                self._run = program.to(device)
            return self

        def __call__(self, pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
            return in_batches(self._outputs, pixels_B3SS, least, most)

        def _outputs(self, pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
            return named(self._run(pixels_B3SS), resolved.taps)

        def grid(self, tokens: int) -> tuple[int, int]:
            return square_grid(tokens)

    return Program()


def in_batches(
    run: Callable[[torch.Tensor], Mapping[str, torch.Tensor]], pixels_B3SS: torch.Tensor, least: int, most: int | None
) -> dict[str, torch.Tensor]:
    """The outputs for any number of images of something that takes from `least` to `most` at a time."""
    import torch

    parts = []
    step = most or len(pixels_B3SS)
    for begin in range(0, len(pixels_B3SS), step):
        part_B3SS = pixels_B3SS[begin : begin + step]
        missing = max(0, least - len(part_B3SS))
        filled_B3SS = torch.cat([part_B3SS, part_B3SS[-1:].expand(missing, -1, -1, -1)]) if missing else part_B3SS
        parts.append({output: x_BTD[: len(part_B3SS)] for output, x_BTD in run(filled_B3SS).items()})
    return {output: torch.cat([part[output] for part in parts]) for output in parts[0]}


def _batches(program: Any) -> tuple[int, int | None]:
    """How many images an exported program takes, at least and at most."""
    names = set(program.graph_signature.user_inputs)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(inputs) != 1 or not hasattr(inputs[0].meta.get("val"), "shape"):
        raise PlanError(f"the program takes {len(inputs)} arguments; it must take one, the pixels [B, 3, S, S]")
    batch = inputs[0].meta["val"].shape[0]
    if isinstance(batch, int):
        return batch, batch
    limits = program.range_constraints.get(batch.node.expr)
    if limits is None:
        return 1, None
    least, most = (int(value) if value.is_Integer else None for value in (limits.lower, limits.upper))  # else infinite
    return max(1, least or 1), most


def _kind(key: str, file: Path) -> str:
    """Which of the two the file is, by its content."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            inside = {name.partition("/")[2] for name in archive.namelist()}
        if "archive_format" in inside or "serialized_exported_program.json" in inside:
            return "export"
        if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
            return "script"
    raise PlanError(
        f"{key}.model: {file} was written neither by torch.export.save nor by torch.jit.save; a pickled model or a "
        "state dict is no program, load it by a function of the source python"
    )
