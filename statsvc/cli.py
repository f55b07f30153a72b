"""The `statsvc` command. Exit codes: 0 done, 1 damage or quarantine, 2 wrong plan, 3 failed, 130 interrupted."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from statsvc.errors import DiskFull, Interrupted, PlanError, StatsvcError

log = logging.getLogger("statsvc")
DONE, DAMAGED, WRONG, FAILED, INTERRUPTED = 0, 1, 2, 3, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="statsvc")
@click.option("-v", "--verbose", is_flag=True, help="Log details, with tracebacks of what workers came across.")
def cli(verbose: bool) -> None:
    """Run every vision teacher once, normalize its features with PHI-S and cache them for students."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


@cli.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Check everything and print phases, rows and bytes; write nothing.")
@click.option("--retry", is_flag=True, help="Take up quarantined dataset shards again.")
@click.option("--store", help="Write there, whatever the plan names: one plan for several places.")
def run(plan: Path, dry_run: bool, retry: bool, store: str | None) -> int:
    """Index, measure, fit and cache what PLAN asks for; run it again after anything and it goes on."""
    from statsvc.plan import read_plan
    from statsvc.progress import Display

    asked = read_plan(plan, store)
    driver = _extra("workers.driver.run", "worker")
    code: int = driver.run(asked, Display(), dry_run=dry_run, retry=retry)
    return code


@cli.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--near", multiple=True, metavar="DIGEST", help="Fit near this phi-s transform; may be repeated.")
@click.option("--teacher", "teachers", multiple=True, help="Only this teacher; may be repeated.")
@click.option("--fresh", is_flag=True, help="Fit afresh: the new targets will have nothing to do with the old ones.")
@click.option("--store", help="The store, whatever the plan names.")
def refit(plan: Path, near: tuple[str, ...], teachers: tuple[str, ...], fresh: bool, store: str | None) -> int:
    """Measure PLAN's dataset shards again as they are now and fit anew, by default near the current fits.

    What is cached is left alone; the next run caches with the new fits, beside it.
    """
    from statsvc.plan import read_plan
    from statsvc.progress import Display

    asked = read_plan(plan, store)
    driver = _extra("workers.driver.refit", "worker")
    code: int = driver.refit(asked, Display(), near=near, teachers=teachers, fresh=fresh)
    return code


store_option = click.option("--store", "location", required=True, help="The store: a path, or s3://bucket/prefix.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@cli.command()
@click.option("--store", help="The store: a path, or s3://bucket/prefix; it may appear later. [STATSVC_STORE]")
@click.option("--host", help="Address to listen on. [STATSVC_HOST; default 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on. [STATSVC_PORT; default 8000]")
def serve(**options: Any) -> int:
    """Serve transforms and feature shards over HTTP until Ctrl-C; a token is set by STATSVC_TOKEN only."""
    server = _extra("api.server", "api")
    server.serve(server.read_settings(**options))
    return DONE


@cli.command()
@store_option
@json_option
def status(location: str, as_json: bool) -> int:
    """Count what is indexed, measured, fitted and cached, and list what could not be used."""
    from statsvc.store.reader import open_store
    from statsvc.store.status import describe, print_status

    found = describe(open_store(location))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_status(found, click.echo)
    return DAMAGED if found["quarantined"] else DONE


@cli.command()
@store_option
@json_option
@click.option(
    "--repair",
    is_flag=True,
    help="Restore from second copies; remove other damage for the next run.",
)
def verify(location: str, as_json: bool, repair: bool) -> int:
    """Check every checksum, count, digest and zarr.json; print one line per damaged or foreign object."""
    from statsvc.integrity.repair import verify_and_repair
    from statsvc.integrity.verify import examine

    removed, restored, requeued = list[str](), list[str](), dict[str, int]()
    if repair:
        verdict, (removed, restored, requeued) = verify_and_repair(location, lambda line: click.echo(line, err=True))
    else:
        verdict = examine(location)
    checked, damage, unfinished = verdict
    foreign = [found for found in damage if found.foreign]
    if as_json:
        damaged = [found._asdict() for found in damage if not found.foreign]
        others = [{"path": found.path, "reason": found.reason, "removed": found.removed} for found in foreign]
        told = {"checked": checked, "damaged": damaged, "foreign": others, "unfinished": unfinished}
        click.echo(json.dumps(told, indent=2))
    else:
        for found in damage:
            click.echo(f"{found.path}: {found.reason}")
        counts = f"{len(damage) - len(foreign)} damaged, {len(foreign)} foreign, {len(unfinished)} unfinished"
        click.echo(f"{checked} objects checked, {counts}")
    if repair and damage:
        again = ", ".join(f"{count} to {phase}" for phase, count in requeued.items() if count)
        if restored:
            click.echo(f"restored {len(restored)} documents from their second copies", err=as_json)
        if removed:
            click.echo(f"removed {len(removed)} objects and commits; `statsvc run PLAN` restores them", err=as_json)
            click.echo(f"dataset shards to do again: {again or 'none'}", err=as_json)
        if left := sum(not found.removed and not found.restored for found in damage):
            click.echo(f"{left} objects were left as they are: their lines say what to do", err=as_json)
    return DAMAGED if damage else DONE


@cli.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--images", default=64, show_default=True, type=click.IntRange(min=2), help="Images of the trial.")
@json_option
@click.option("--store", help="The store, whatever the plan names.")
def estimate(plan: Path, images: int, as_json: bool, store: str | None) -> int:
    """Say what PLAN would take, in bytes, noise and hours, after a trial with a few images; write nothing."""
    from statsvc.plan import read_plan

    asked = read_plan(plan, store)
    found, tables = _extra("workers.estimate.estimate", "worker"), _extra("workers.estimate.table", "worker")
    told = found.estimate(asked, images, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(told, indent=2, allow_nan=False))
    else:
        tables.print_estimate(told)
    return DONE


@cli.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("student", type=click.Path(path_type=Path))
@click.option(
    "--store", help="The store, whatever the plan names: a path, s3://bucket/prefix, or the URL of a service."
)
def distill(plan: Path, student: Path, store: str | None) -> int:
    """Train a reference student by the recipe STUDENT on the targets that PLAN cached, and measure it.

    Run it again after anything and it goes on. On several GPUs: torchrun --nproc_per_node 8 -m statsvc.cli distill ...
    """
    from statsvc.plan import read_plan
    from statsvc.progress import Display

    asked = read_plan(plan, store)
    trainer, recipes = (
        _extra("statsvc.student.distill.run", "student"),
        _extra("statsvc.student.distill.recipe", "student"),
    )
    code: int = trainer.distill(asked, recipes.read_recipe(student), Display())
    return code


@cli.command()
@store_option
@click.option("--teacher", required=True, help="Whose transform or targets.")
@click.option("--output", help="patches or summary. [default: patches]")
@click.option("--method", help="The transform, by the method that was fitted. [default: phi-s]")
@click.option("--digest", help="The transform, by its digest: also one that is no current fit.")
@click.option("--format", type=click.Choice(["safetensors", "npz", "onnx", "npy"]), help="[default: FILE's suffix]")
@click.option("--dtype", type=click.Choice(["float64", "float32", "float16"]), help="Of the numbers in FILE.")
@click.option("--inverse", is_flag=True, help="onnx: the way back, from targets to features.")
@click.option("--space", type=click.Choice(["normalized", "teacher"]), help="npy: of the numbers. [default: teacher]")
@click.option("--set", "cache_set", help="npy: the cache set, where there are several.")
@click.option("--rows", help="npy: numbers and ranges, as 0,5,9 or 0:1000. [default: all that have a target]")
@click.option("--force", is_flag=True, help="Replace FILE.")
@click.argument("file", type=click.Path(path_type=Path))
def export(location: str, file: Path, force: bool, **wish: Any) -> int:
    """Write a transform (safetensors, npz, onnx), or the features of an output (npy), to FILE.

    Beside FILE.npy, FILE.npy.rows.npy holds the number of each row.
    """
    from statsvc.store.export import ExportRequest
    from statsvc.store.export import export as write

    click.echo(write(location, ExportRequest(**wish), file, force=force))
    return DONE


def _extra(module: str, extra: str) -> Any:
    """A module that only an extra brings. Raises PlanError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PlanError(f"this command needs {error.name}: pip install 'statsvc[{extra}]'") from error


def main() -> None:
    """The entry point: errors become one sentence on standard error and an exit code, never a traceback."""
    sys.exit(_guarded(lambda: cli.main(standalone_mode=False)))


def _guarded(command: Callable[[], Any]) -> int:
    try:
        code = command()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return WRONG
    except PlanError as error:
        click.echo(f"error: {error}", err=True)
        return WRONG
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:
        click.echo(str(error) or "interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return DONE  # whoever read our output had enough of it
    except (StatsvcError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error = DiskFull("the disk of the store is full; free some space, then run the same command to go on")
        click.echo(f"error: {error}", err=True)
        return FAILED
    except Exception as error:
        log.debug("unexpected", exc_info=True)
        click.echo(f"error: unexpected {type(error).__name__}: {error}; `statsvc -v ...` shows where", err=True)
        return FAILED
    return code if isinstance(code, int) else DONE


if __name__ == "__main__":
    main()
