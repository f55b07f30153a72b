"""Makes .venv-teachers, where timm and open_clip are tested: `python -m tests.support.teachers_env`.

It is a layer on the environment that runs this: torch, transformers and all the rest come from there, so it takes
seconds and 50 MB. A second one, because transformers imports torchvision wherever it is installed, and beside a torch
for CPUs it cannot be imported without torchvision_operators.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests import ROOT

HERE = Path(__file__).parent
FOLDER = ROOT / ".venv-teachers"
PYTHON = FOLDER / "bin/python"
REQUIREMENTS = HERE / "teachers-env.txt"


def create(folder: Path) -> None:
    """The environment in that folder, anew."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder)
    python = folder / "bin/python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip())
    shutil.copy(HERE / "torchvision_operators.py", packages)
    below = os.path.relpath(sysconfig.get_path("purelib"), packages)
    # A line with an import is run at the start of the interpreter. addsitedir, unlike a mere path, also takes the
    # .pth files there, by which the editable install of statsvc is found.
    (packages / "layer.pth").write_text(
        f"import os, site; site.addsitedir(os.path.normpath(os.path.join(sitedir, {below!r})))\n"
        "import torchvision_operators\n"
    )
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
            "--requirement", str(REQUIREMENTS),
        ],
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    create(FOLDER)
