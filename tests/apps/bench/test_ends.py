"""However a bench ends, nothing of it stays: no side, no memory group, no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moe_offload.apps.bench.run import unwound_by_signals
from moe_offload.apps.bench.sides import lifeline, limit
from tests.paths import ROOT

#: Starts a process that holds the lifeline, says its number, and waits; that one is busy, and starts another.
PARENT = """
import os, runpy, socket, subprocess, sys
ours, theirs = socket.socketpair()
busy = '''
import os, runpy, subprocess, sys
runpy.run_path(sys.argv[1])["end_with"](int(sys.argv[2]))
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), inner.pid, flush=True)
while True:
    pass
'''
command = [sys.executable, "-c", busy, sys.argv[1], str(theirs.fileno())]
subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True).wait()
"""


def gone(pids: list[int], within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        living = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not living:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_side_and_what_it_has_started_end_with_the_bench(number):
    command = [sys.executable, "-c", PARENT, lifeline.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        sides = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(sides) == 2
        parent.send_signal(number)
    assert gone(sides)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_runs_every_finally(number):
    before, cleaned = signal.getsignal(number), []
    with pytest.raises(SystemExit) as ended, unwound_by_signals():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), number)  # a second one does not stop the cleaning up
            cleaned.append(True)
    assert ended.value.code == 128 + number and cleaned and signal.getsignal(number) is before


def test_groups_of_sides_that_are_gone_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"moe_offload-bench-{ended.pid}", f"moe_offload-bench-{os.getpid()}", "moe_offload-bench-other"):
        (tmp_path / name).mkdir()
    limit._sweep(tmp_path)
    assert {group.name for group in tmp_path.iterdir()} == {
        f"moe_offload-bench-{os.getpid()}",
        "moe_offload-bench-other",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_a_bench_that_is_ended_while_a_side_loads(number, tmp_path):
    command = [sys.executable, "-m", "moe_offload", "bench", "synthetic:tiny", "--layers", "1", "--residency", "50%"]
    command += ["--sides", "ours", "--prompt-tokens", "8", "--new-tokens", "2", "--cache", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as bench:
        assert bench.stderr is not None
        for line in bench.stderr:
            if "ours: loading" in line:
                break
        sides: list[int] = []
        while not sides and bench.poll() is None:
            sides = [child.pid for child in psutil.Process(bench.pid).children(recursive=True)]
        bench.send_signal(number)
        bench.stderr.close()
        code = bench.wait(120)
    assert sides and code == (143 if number == signal.SIGTERM else -number)
    assert gone(sides)
    left = list(tmp_path.glob(".moe_offload-*"))
    assert len(left) == (number == signal.SIGKILL) and (tmp_path / "tiny_1-layers_skewed").is_dir()
    if number == signal.SIGTERM:
        assert not [g for root in ("memory", ".") for g in (limit.CGROUPS / root).glob(f"{limit.PREFIX}{sides[0]}")]
