"""`make bench-gpu`: every check and benchmark that needs a CUDA device, in one script of less than eight minutes.

    python -m tests.benchmarks.gpu [--json RECORD] [--readme README.md]
    python -m tests.benchmarks.gpu --device cpu --small        tries the script itself; its figures mean nothing

Runs the tests marked `gpu`, then measures what statistics, targets and copies cost beside the forward pass of a
ViT-L in bfloat16, and whole units beside the bare forward loop. `--readme` replaces what stands between
`<!-- bench-gpu:begin -->` and `<!-- bench-gpu:end -->`. Exit codes: 0 done, 1 a test failed, 2 no CUDA device.

Shape suffixes: B = images, T = tokens, D = channels, k = channels of a target.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from statsvc.numerics.codec import codec
from statsvc.numerics.moments import Moments, MomentsStream
from statsvc.numerics.normalizations import fit
from tests.benchmarks.pipeline import Workload
from tests.benchmarks.pipeline import table as pipeline_table
from tests.benchmarks.report import replace_block, terminal, write_readme, write_record
from tests.benchmarks.rows import Goal, Row, Table, environment
from tests.benchmarks.timing import Case, alternate
from workers.unit.device import HostCopy

DTYPES = ("int8", "int4", "float16")


@dataclass(frozen=True, slots=True)
class Setting:
    """How large everything is."""

    device: str
    vit: dict[str, Any]
    label: str
    batch: int
    pipeline: tuple[Workload, ...]
    repeats: int

    @property
    def dim(self) -> int:
        dim: int = self.vit["hidden_size"]
        return dim


def full(device: str) -> Setting:
    dinov2 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224}
    decoders = max(1, len(os.sched_getaffinity(0)) - 1)
    units = tuple(
        Workload("Dinov2-L/14 at 224, bfloat16", dinov2, 4096, 128, decoders, "bfloat16", device, 2, dtype)
        for dtype in ("int8", "int4")
    )
    vit_l = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return Setting(device, vit_l, "ViT-L/16 at 224, bfloat16", 64, units, 15)


def small(device: str) -> Setting:
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    unit = Workload("a tiny Dinov2, bfloat16", tiny, 8, 4, 1, "bfloat16", device, 1)
    vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return Setting(device, vit, "a tiny ViT, bfloat16", 2, (unit,), 1)


def finished(device: str, case: Case) -> Case:
    """The case with the device's part of it."""

    def run() -> None:
        case()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def checks() -> tuple[Table, bool]:
    """The tests that need a device; whether all of them passed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = ended.stdout.strip().splitlines()
    if ended.returncode:
        print(ended.stdout)
    summary = (lines[-1] if lines else "pytest printed nothing").partition(" in ")[0]
    return Table(
        "Tests on the device", (), "", ("tests", "outcome"), (("pytest -m gpu", summary),)
    ), not ended.returncode


def accuracy(setting: Setting) -> Table:
    """The device's own arithmetic, beside two passes in float64 over the same numbers."""
    rows = []
    for ratio in (1.0, 1e4, 1e5):
        x_ND = torch.randn(16_384, setting.dim, device=setting.device) + ratio
        true_D = x_ND.to(torch.float64).var(dim=0)
        error = (Moments.of(x_ND).covariance().diagonal() / true_D - 1).abs().max().item()
        rows.append(
            Row(f"mean/std of {ratio:.0e}".replace("e+0", "e"), error, goal=Goal(1e-6, at_most=True, of="ours"))
        )
    return Table("Relative error of a channel's variance on the device, worst channel", tuple(rows))


def beside_forward(setting: Setting) -> list[Table]:
    """What one batch costs in each step, beside the forward pass that gave it; and the way to the host."""
    device, repeats = setting.device, setting.repeats
    size = 224 if setting.dim > 32 else 32
    model: Any = ViTModel(ViTConfig(**setting.vit, image_size=size), add_pooling_layer=False)
    model.eval().to(device)
    pixels_B3SS = torch.randn(setting.batch, 3, size, size, device=device)

    def forward() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            x_BTD: torch.Tensor = model(pixels_B3SS).last_hidden_state.float()
        return x_BTD

    with torch.inference_mode():
        # Features without the model's own layer norm, of which a transform needs variances.
        x_BTD = torch.randn_like(forward())
        x_ND = x_BTD.flatten(0, 1)
        stream: MomentsStream[torch.Tensor] = MomentsStream(setting.dim)
        transform = fit(Moments.of(x_ND.cpu().numpy()), "phi-s")
        mean_D, matrix_kD, _ = transform.arrays_like(x_ND)
        y_BTk = (x_BTD - mean_D) @ matrix_kD.T

        cases: dict[str, Callable[[], Any]] = {
            "forward": forward,
            "statistics": lambda: stream.add(x_ND),
            "transform": lambda: (x_BTD - mean_D) @ matrix_kD.T,
        }
        for dtype in DTYPES:
            stored = codec(dtype).encode(y_BTk)
            cases[f"encode {dtype}"] = partial(codec(dtype).encode, y_BTk)
            cases[f"decode {dtype}"] = partial(codec(dtype).decode, stored, setting.dim)
        seconds = alternate({name: finished(device, case) for name, case in cases.items()}, repeats)
        codes = codec("int8").encode(y_BTk)
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: HostCopy(codes).wait(),
            "pageable": lambda: {name: array.cpu() for name, array in codes.items()},
        }
        copies = alternate({name: finished(device, way) for name, way in ways.items()}, repeats)
        nbytes = sum(array.nbytes for array in codes.values())
    ms = {name: each * 1e3 for name, each in seconds.items()}
    goals = {"statistics": Goal(20), "transform": Goal(20), "encode int8": Goal(20)}
    rows = [
        Row(name, ms[name], "ms", ms["forward"], "forward pass", "less", goals.get(name))
        for name in cases
        if name != "forward"
    ]
    rate = {name: nbytes / each / 1e9 for name, each in copies.items()}
    copied = Row("codes into pinned memory", rate["ours"], "GB/s", rate["pageable"], "pageable memory", goal=Goal(1))
    title = f"Beside the forward pass of {setting.label}, {setting.batch} images"
    return [
        Table(f"{title} ({setting.batch / seconds['forward']:.0f} images/s)", tuple(rows)),
        Table(f"From the device to the host, {nbytes / 1e6:.0f} MB", (copied,)),
    ]


def about_device(device: str) -> dict[str, Any]:
    """The environment, with the device's name, memory, driver and CUDA version."""
    about = environment(("statsvc", "numpy", "torch", "transformers"))
    if device != "cuda":
        return about
    properties = torch.cuda.get_device_properties(0)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() or driver
    about["versions"] |= {"CUDA": str(torch.version.cuda), "driver": driver}
    return about | {"device": properties.name, "device_memory_GB": round(properties.total_memory / 1e9)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of a test, which measure nothing")
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--readme", type=Path, help="the file whose tables are replaced")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here, so nothing was measured; --device cpu --small tries the script itself")
        return 2
    try:
        if chosen.readme:  # before minutes are spent on figures that find no place
            replace_block(chosen.readme.read_text(), "", "bench-gpu")
    except (OSError, ValueError) as error:
        parser.error(f"{chosen.readme}: {error}")
    setting = small(chosen.device) if chosen.small else full(chosen.device)
    passed, tables = True, []
    if chosen.device == "cuda":
        tested, passed = checks()
        tables.append(tested)
    tables += [accuracy(setting), *beside_forward(setting), *(pipeline_table(work, None) for work in setting.pipeline)]
    about = about_device(chosen.device)
    print(about, *map(terminal, tables), sep="\n")
    if chosen.json:
        write_record(chosen.json, about, {"gpu": tables})
    if chosen.readme:
        write_readme(chosen.readme, about, {"gpu": tables}, "bench-gpu")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
