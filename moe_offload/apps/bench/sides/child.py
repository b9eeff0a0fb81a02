"""`Child`: the bench's end of a side (`side.py`). It starts the process, limits its memory, and sends it commands."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import IO, Any

from ....errors import OffloadError
from .limit import MemoryLimit

TIMEOUT_S = 900.0


class SideFailed(OffloadError):
    """A side of the benchmark ended or reported an error."""


class Child:
    """A side in its own process, limited to `limit_bytes` beyond what it holds before it loads anything."""

    def __init__(self, side: str, settings: dict[str, Any], limit_bytes: int | None):
        self.side = side
        self._said: IO[bytes] = tempfile.TemporaryFile()
        self._lifeline, its_end = socket.socketpair()
        line = its_end.fileno()
        with its_end:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "moe_offload.apps.bench.sides.side",
                    json.dumps({"side": side, **settings}),
                    str(line),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                pass_fds=[line],
                start_new_session=True,  # a group of its own, so that what it starts ends with it
            )
        self._limit: MemoryLimit | None = None
        try:
            self.baseline_bytes = int(self._answer()["baseline_bytes"])
            if limit_bytes is not None:
                self._limit = MemoryLimit(self._process.pid, limit_bytes)
        except BaseException:
            self._kill()
            self.close()
            raise

    @property
    def limited(self) -> str:
        return self._limit.enforced if self._limit else "no limit"

    @property
    def peak_with_cache_bytes(self) -> int | None:
        """The most memory it has held since it was limited, with what is cached of the files that it reads."""
        return self._limit.peak_bytes() if self._limit else None

    def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send a command, return its answer. Raises `SideFailed` with what the process said last."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT_S)
        if not ready:
            raise SideFailed(f"{self.side}: no answer within {TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideFailed(f"{self.side}: {answer['error']}")
        return answer

    def _ended(self) -> SideFailed:
        code = self._process.wait()
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-3:]
        why = "killed, as when memory runs out" if code == -9 else f"exit code {code}"
        return SideFailed(f"{self.side}: its process ended ({why}). {' | '.join(last)}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        self._kill()
        self._process.wait()
        self._lifeline.close()
        if self._process.stdout:
            self._process.stdout.close()
        self._said.close()
        if self._limit:
            self._limit.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._kill()
        self.close()

    def _kill(self) -> None:
        """It, and whatever it has started."""
        with contextlib.suppress(OSError):  # none of them is there any more
            os.killpg(self._process.pid, signal.SIGKILL)
