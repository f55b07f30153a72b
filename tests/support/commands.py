"""The command as a user starts it, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import psutil

COMMAND = [sys.executable, "-c", "from statsvc.cli import main; main()"]


def statsvc_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What became of the command."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def is_spawned(process: psutil.Process) -> bool:
    """Whether it is a worker or decoder that a driver started."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False
