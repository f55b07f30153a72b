"""What sources with files share: the hub's cache, JSON files, digests, and libraries that may not be installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from statsvc.errors import PlanError
from statsvc.plan import Teacher


def snapshot(key: str, plan: Teacher, repository: str, patterns: list[str], check: Callable[[Path], object]) -> Path:
    """The folder of a hub repository in the local cache, downloaded where it is not there or `check` refuses it."""
    import huggingface_hub

    for local_only in (True, False):
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository, revision=plan.revision, local_files_only=local_only, allow_patterns=patterns
                )
            )
        except Exception as error:  # offline, no such model, no rights: one sentence serves all of them
            problem = error
            continue
        try:
            check(folder)
        except PlanError as error:  # a download that was broken off, or a repository without such files
            problem = error
            continue
        return folder
    revision = f" --revision {plan.revision}" if plan.revision else ""
    reason = first_line(problem)
    raise PlanError(
        f"{key}.model: {repository!r} is neither in the local cache nor to be had from the hub ({reason}); on a "
        f"machine with network run `hf download {repository}{revision}`, copy its cache here and set HF_HOME, or "
        "give a local folder"
    )


def commit_of(folder: Path) -> str | None:
    """The hub's commit, which names the folder of a snapshot."""
    return folder.name if folder.parent.name == "snapshots" else None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises PlanError."""
    try:
        document = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(document, dict):
        raise PlanError(f"{file} is not a JSON object")
    return document


def file_digest(file: Path) -> bytes:
    """sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def first_line(error: Exception) -> str:
    """What a library says of its failure, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def require(key: str, library: str, extra: str) -> None:
    """Raises PlanError where a library is not installed. It is not imported."""
    if importlib.util.find_spec(library) is None:
        raise PlanError(f"{key}.source: this source needs {library}: pip install 'statsvc[{extra}]'")


def ask(key: str, script: str, *arguments: str) -> str:
    """What a script prints that needs a library. In a process of its own: such libraries import torch."""
    answer = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise PlanError(f"{key}.model: {arguments[0]!r} could not be looked up: {lines[-1]}")
    return answer.stdout.strip()
