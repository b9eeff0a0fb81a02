"""Processes with a running model that can be watched, and a folder of their own for the sockets."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT


def use_folder(monkeypatch, folder: Path) -> Path:
    """Look for sockets, and make them, below `folder` only; returns where."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder / "moe_offload"


@contextlib.contextmanager
def models(count: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes, each with a model that is generating; they end with the block, if they have not before."""
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(count):
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.live_child"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(_end, child)
            started.append(child)
        for child in started:
            assert int(child.stdout.readline()) == child.pid
            assert child.stdout.readline() == "running\n"
        yield started


def _end(child: subprocess.Popen) -> None:
    child.kill()
    child.communicate(timeout=240)
