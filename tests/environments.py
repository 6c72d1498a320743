"""An environment to install into, that has what is installed here and nothing of this repository's plugins."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

CORE = "ourvidz_core"
_OURS = ("ourvidz", "acme")


def make_environment(directory: Path) -> dict[str, str]:
    """Make an environment in ``directory``; answers the variables of a shell in which it is active.

    ``pip`` installs into it without a network: what a project needs must be there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    (site,) = directory.glob("lib/python*/site-packages")
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        # Of ours an editable installation has a .dist-info and a .pth, whose name begins with an underscore.
        name = installed.name.lower().removeprefix("_editable_impl_")
        if name.startswith(CORE) or not name.startswith(_OURS):
            (site / installed.name).symlink_to(installed)
    for command, module in (("ourvidz", CORE), ("pytest", "pytest"), ("pip", "pip")):
        script = directory / "bin" / command
        script.write_text(f'#!/bin/sh\nexec "{directory}/bin/python" -m {module} "$@"\n')
        script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OURVIDZ_", "SUPABASE_", "PIP_"))}
    return {
        **kept,
        "PATH": f"{directory / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": "",
        "OURVIDZ_STATE_DIR": str(directory / "state"),
        "OURVIDZ_WORK_DIR": str(directory / "work"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # sets what it is called: no isolation
    }
