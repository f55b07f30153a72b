"""`make experiment`: the paper's comparison, small: one student, one order of the data, twelve things to minimize.

    python -m tests.benchmarks.experiment [--json RECORD] [--readme README.md]
    python -m tests.benchmarks.experiment --from RECORD --readme README.md      writes the tables of a record again

Four teachers whose features differ in scale as the paper's do (experiment_teachers.py) are run over photographs by
`statsvc run`, which keeps features as they are: one store serves all methods. Fits see the training photographs alone.
Then for every method and seed the same student is trained from the same first weights on the same rows in the same
order, and measured on held-out photographs with its heads folded. The seed draws the first weights and the order.

What all methods share, so that only targets and loss differ:
- AdamW with one learning rate, without clipping. eps is 1e-15: the usual 1e-8 is as large as gradients of the smallest
  teacher's squared errors, and would take part in the comparison.
- Every student starts by saying each teacher's mean feature, by the bias of its heads, as means of ten deviations would
  take most of so short a training to learn.
- With targets in the teacher's space, a head's output is multiplied by that teacher's sigma_g, one number, before the
  loss: Adam moves a weight by no more than the learning rate in a step, so that a head would otherwise learn a large
  teacher slowly whatever its loss. The loss is still that of raw features. The row `MSE, heads as they are` is without.

Suffixes: N = photographs, T = patches, D = channels of the teacher, k = channels of a target, B = rows of a batch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import statsvc
from statsvc.numerics.normalizations import METHODS as NORMALIZATIONS
from statsvc.numerics.transform import Transform
from statsvc.student import Denormalize, Normalize, TargetDataset
from statsvc.student.distill.evaluate import Matching
from statsvc.student.distill.fold_heads import fold
from statsvc.student.distill.objective import Objective
from statsvc.student.distill.recipe import Loss, Train
from statsvc.student.distill.training import rate
from statsvc.student.distill.vit import Shape, Student
from tests.benchmarks.experiment_tables import Runs, tables, verdict
from tests.benchmarks.experiment_teachers import SIZES, effective_rank, write_teachers
from tests.benchmarks.report import markdown, replace_block, terminal
from tests.benchmarks.rows import environment
from workers.demo import write_shard

SEEDS = (0, 1, 2)
PHOTOGRAPHS, SHARDS = 128, 12  # of a tar, and tars to train on; one more is held out
SIDE, PATCH, DIM, DEPTH, HEADS = 112, 14, 96, 3, 4
TRAIN = Train(steps=400, batch_size=16, lr=2e-3, weight_decay=0.02, warmup=40)
EPS = 1e-15
PACKAGES = ("statsvc", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Method:
    """transform: by which targets are normalized; None: features as they are. scaled: heads times sigma_g."""

    name: str
    loss: Loss
    transform: str | None = None
    scaled: bool = True


METHODS = (
    Method("MSE", Loss()),
    Method("Cosine", Loss(patches="cosine")),
    Method("Hybrid MSE", Loss(patches="hybrid-mse")),
    Method("Hybrid Smooth-L1", Loss(patches="hybrid-smooth-l1")),
    Method("Global", Loss(), "global"),
    Method("Standardize", Loss(), "standardize"),
    Method("PHI-S", Loss(), "phi-s"),
    Method("PCA-W", Loss(), "pca"),
    Method("ZCA", Loss(), "zca"),
    Method("HCA", Loss(), "hca"),
    Method("AdaLoss", Loss(balance="ada")),
    Method("AdaLoss + PHI-S", Loss(balance="ada"), "phi-s"),
    Method("MSE, heads as they are", Loss(), scaled=False),
)


class Photographs:
    """What a training needs, in memory, read once from the store by each process.

    images    float32 [N, 3, S, S] by part, train and held-out
    features  float32 [N, T, D] by part and teacher
    """

    def __init__(self, store: str, train: list[int], held_out: list[int]) -> None:
        self.images, self.features = {}, {}
        opened = statsvc.open(store)
        self.transforms = {
            name: {method: opened.teacher(name).transform(method) for method in NORMALIZATIONS} for name in SIZES
        }
        for part, only in (("train", train), ("held-out", held_out)):
            dataset = TargetDataset(
                store, teachers=list(SIZES), space="teacher", image_size=SIDE, shuffle=False, only=only
            )  # fmt: skip
            batches = list(dataset)
            self.images[part] = torch.cat([batch["image"] for batch in batches])
            self.features[part] = {
                name: torch.cat([batch["targets"][name]["patches"] for batch in batches]) for name in SIZES
            }


def train_one(photographs: Photographs, method: Method, seed: int) -> dict[str, Any]:
    """Train and measure: {teacher: report of Matching}, on the held-out photographs."""
    maps = {name: head_map(each, method) for name, each in photographs.transforms.items()}
    # What the loss sees: targets as they are normalized, or features.
    apply = {name: Normalize(each) if method.transform else torch.nn.Identity() for name, each in maps.items()}
    undo = {name: torch.nn.Identity() if method.transform else Denormalize(each) for name, each in maps.items()}
    with torch.no_grad():
        targets = {name: apply[name](x_NTD) for name, x_NTD in photographs.features["train"].items()}
    torch.manual_seed(seed)
    outputs = {name: {"patches": tuple(x_NTD.shape[1:])} for name, x_NTD in photographs.features["train"].items()}
    student = Student(Shape(SIDE, PATCH, DIM, DEPTH, HEADS, 4.0, outputs))  # type: ignore[arg-type]
    if method.scaled:
        start_at_the_mean(student, maps, photographs)
    objective = Objective(method.loss, dict.fromkeys(SIZES, ("patches",)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=TRAIN.lr, weight_decay=TRAIN.weight_decay, eps=EPS)
    for step, rows_B in enumerate(order(len(photographs.images["train"]), seed)):
        for group in optimizer.param_groups:
            group["lr"] = TRAIN.lr * rate(step, TRAIN)
        said = student(photographs.images["train"][rows_B])
        found = {name: {"patches": undo[name](each["patches"])} for name, each in said.items()}
        wanted = {name: {"patches": y_NTk[rows_B]} for name, y_NTk in targets.items()}
        loss, _ = objective(found, wanted, {})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folded = fold(student, {name: {"patches": each} for name, each in maps.items()}).eval()
    return measure(folded, photographs, maps if method.transform else None)


def head_map(transforms: dict[str, Transform], method: Method) -> Transform:
    """From a head's output to features: the inverse of the method's transform, or one number, the teacher's sigma_g."""
    if method.transform:
        return transforms[method.transform]
    dim, alpha = len(transforms["global"].mean), transforms["global"].alpha
    gain = 1 / alpha if method.scaled and alpha else 1.0
    unit_DD = np.eye(dim)
    return Transform("none", np.zeros(dim), unit_DD / gain, unit_DD * gain, 2)


@torch.no_grad()
def start_at_the_mean(student: Student, maps: dict[str, Transform], photographs: Photographs) -> None:
    for name, each in maps.items():
        mean_D = photographs.features["train"][name].double().mean((0, 1)).numpy()
        student.heads[f"{name}/patches"][1].bias.copy_(torch.from_numpy(each.apply(mean_D)))  # type: ignore[index]


def order(rows: int, seed: int) -> torch.Tensor:
    """[steps, B]: the rows of every batch; epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    needed = TRAIN.steps * TRAIN.batch_size
    epochs = [torch.randperm(rows, generator=generator) for _ in range(-(-needed // rows))]
    return torch.cat(epochs)[:needed].view(TRAIN.steps, TRAIN.batch_size)


@torch.no_grad()
def measure(folded: Student, photographs: Photographs, maps: dict[str, Transform] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    said = [folded(image) for image in torch.split(photographs.images["held-out"], 32)]
    for name, true_NTD in photographs.features["held-out"].items():
        matching = Matching(true_NTD.shape[-1], maps[name] if maps else None, torch.device("cpu"))
        matching.add(torch.cat([each[name]["patches"] for each in said]).flatten(0, 1), true_NTD.flatten(0, 1))
        found[name] = matching.report()
    return found


def prepare(folder: Path) -> tuple[str, list[int], list[int]]:
    """Teachers, photographs and a store of the features; which of its dataset shards are for training."""
    for shard in range(SHARDS + 1):
        name = f"held-out-{shard}.tar" if shard == SHARDS else f"train-{shard}.tar"
        write_shard(folder / name, range(shard * PHOTOGRAPHS, (shard + 1) * PHOTOGRAPHS))
    plan = {
        "store": str(folder / "store"),
        "teachers": write_teachers(folder),
        "statistics": {"images": "all"},
        "targets": {"space": "teacher", "dtype": "float32"},
    }
    for shards in (["train-*.tar"], ["train-*.tar", "held-out-*.tar"]):  # the fits are made by the first run
        plan["data"] = {"shards": [str(folder / pattern) for pattern in shards]}
        (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
        subprocess.run([sys.executable, "-m", "statsvc.cli", "run", str(folder / "plan.yaml")], check=True)
    store = statsvc.open(str(folder / "store"))
    names = {shard: str(store.ledger.read("index", shard).name) for shard in store.ledger.shards("index")}  # type: ignore[union-attr]
    held_out = [shard for shard, name in names.items() if name.startswith("held-out")]
    return str(folder / "store"), [shard for shard in names if shard not in held_out], held_out


def describe(photographs: Photographs) -> dict[str, dict[str, float]]:
    """The teachers' features on the photographs to train on, as the paper's Tables 6 to 8 describe them."""
    found = {}
    for name, x_NTD in photographs.features["train"].items():
        x_ND = x_NTD.flatten(0, 1).double().numpy()
        transforms = photographs.transforms[name]
        found[name] = {
            "dim": x_ND.shape[1], "mean": x_ND.mean(), "std": x_ND.std(), "least_mean": x_ND.mean(0).min(),
            "largest_mean": x_ND.mean(0).max(), "least_std": x_ND.std(0).min(), "largest_std": x_ND.std(0).max(),
            "alpha_global": transforms["global"].alpha, "alpha_phi_s": transforms["phi-s"].alpha,
            "effective_rank": effective_rank(x_ND), "variance": x_ND.var(0).mean(),
        }  # fmt: skip
    return {name: {key: float(value) for key, value in each.items()} for name, each in found.items()}


_here: Photographs


def begin(*of: Any) -> None:
    """In each process: one thread, so that figures do not depend on how many processes there are."""
    global _here
    torch.set_num_threads(1)
    _here = Photographs(*of)


def one(task: tuple[int, int]) -> tuple[str, int, dict[str, Any], float]:
    method, begun = METHODS[task[0]], time.monotonic()
    return method.name, task[1], train_one(_here, method, task[1]), time.monotonic() - begun


def experiment() -> dict[str, Any]:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        of = prepare(Path(folder))
        begin(*of)
        teachers, runs = describe(_here), []
        print(f"\nprepared in {time.monotonic() - begun:.0f} s", flush=True)
        tasks = [(method, seed) for seed in SEEDS for method in range(len(METHODS))]
        processes = len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin, of) as pool:
            for name, seed, found, seconds in pool.map(one, tasks):
                runs.append({"method": name, "seed": seed, "teachers": found})
                print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    settings = {
        "train": TRAIN.model_dump(), "eps": EPS, "student": [SIDE, PATCH, DIM, DEPTH, HEADS],
        "photographs": [PHOTOGRAPHS * SHARDS, PHOTOGRAPHS], "methods": [each.name for each in METHODS],
        "losses": [asdict(each) | {"loss": each.loss.model_dump()} for each in METHODS],
    }  # fmt: skip
    print(f"\n{time.monotonic() - begun:.0f} s in all", flush=True)
    return {"environment": environment(PACKAGES), "settings": settings, "about_teachers": teachers, "runs": runs}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--readme", type=Path, help="the file whose tables are replaced")
    parser.add_argument("--from", dest="record", type=Path, help="a record to take the figures from")
    chosen = parser.parse_args(arguments)
    if chosen.readme:  # before minutes are spent on figures that find no place
        replace_block(chosen.readme.read_text(), "", "experiment")
    found = json.loads(chosen.record.read_text()) if chosen.record else experiment()
    runs = Runs(found["runs"])
    made = tables(runs, found["about_teachers"])
    for table in made:
        print(terminal(table))
    said = verdict(runs)
    print(f"\n{said}")
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if chosen.readme:
        block = markdown(found["environment"], {"experiment": made}, f"{said}\n\nMeasured in one run.")
        chosen.readme.write_text(replace_block(chosen.readme.read_text(), block, "experiment"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
