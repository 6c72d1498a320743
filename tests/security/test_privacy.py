"""What a worker knows, its engines cannot read: not from its environment, nor from its memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

#: Gives up what lets root read any process, as a container does, and becomes the program that follows.
WITHOUT_CAPABILITIES = """
import ctypes, os, sys
for capability in range(64):
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; users that are not root have none
os.execv(sys.argv[1], sys.argv[1:])
"""
#: Starts another Python, as a worker starts its engine, which reads what it can of its parent.
PARENT = """
import subprocess, sys
if sys.argv[1] == "private":
    from ourvidz_core.worker.privacy import keep_to_itself
    keep_to_itself()
subprocess.run([sys.executable, "-c", sys.argv[2]], env={"PATH": "/usr/bin"}, check=True)
"""
CHILD = """
import json, os
read = {}
for name in ("environ", "maps"):
    try:
        with open(f"/proc/{os.getppid()}/{name}", "rb") as file:
            read[name] = name == "environ" and b"canary" in file.read()
    except PermissionError:
        read[name] = "refused"
print(json.dumps(read))
"""


def seen_by_a_child(how: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CAPABILITIES, sys.executable, "-c", PARENT, how, CHILD],
        env={"PATH": "/usr/bin", "CALLBACK_SECRET": "canary", "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_child_cannot_read_its_parents_environment_or_memory() -> None:
    assert seen_by_a_child("open")["environ"] is True
    assert seen_by_a_child("private") == {"environ": "refused", "maps": "refused"}
