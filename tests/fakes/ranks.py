"""A few processes that form a group for each check; they are started once, and again where a check has ended one."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time

from tests.paths import ROOT

MOST_S = 120  # for one check, on a machine that does other things as well


class Ranks:
    """`run` a function of `tests/ranks/checks.py` on all of them; `tell` and `answer` are its two halves."""

    def __init__(self, world):
        self.world, self.processes = world, []

    def run(self, check, **given):
        """What each rank answers, by rank. A rank that raised fails the test."""
        self.tell(check, **given)
        answers = [self.answer(rank) for rank in range(self.world)]
        wrong = [answer["where"] for answer in answers if "error" in answer]
        assert not wrong, "\n".join(wrong)
        return [answer["value"] for answer in answers]

    def tell(self, check, **given):
        if any(process.poll() is not None for process in self.processes) or not self.processes:
            self._start()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        line = json.dumps({"check": f"tests.ranks.checks:{check}", "port": port, "given": given}) + "\n"
        for process in self.processes:
            process.stdin.write(line.encode())
            process.stdin.flush()

    def answer(self, rank, within_s=MOST_S):
        """What one rank answers; `{"error": ...}` where it raised. None where it has ended."""
        out, line, ends_s = self.processes[rank].stdout, b"", time.monotonic() + within_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([out], [], [], max(0, ends_s - time.monotonic()))
            assert ready, f"rank {rank} has not answered within {within_s} s"
            read = os.read(out.fileno(), 1 << 20)
            if not read:
                return None
            line += read
        return json.loads(line)

    def close(self):
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.processes = []

    def _start(self):
        self.close()
        for rank in range(self.world):
            command = [sys.executable, "-m", "tests.fakes.rank_child", str(rank), str(self.world)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.processes.append(subprocess.Popen(command, cwd=ROOT, bufsize=0, **pipes))
