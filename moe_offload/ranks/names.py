"""How a rank is called in messages, and how it can be told that its process has ended."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from typing import Any

import psutil


@dataclass(frozen=True)
class RankName:
    """One process of a run: its rank, its machine, and which process of that machine it is."""

    rank: int
    host: str
    pid: int
    born_s: float

    @classmethod
    def of_this_process(cls, rank: int) -> RankName:
        process = psutil.Process()
        return cls(rank, socket.gethostname(), os.getpid(), process.create_time())

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> RankName:
        return cls(int(found["rank"]), str(found["host"])[:255], int(found["pid"]), float(found["born_s"]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def has_ended(self) -> bool:
        """Whether its process is known to be gone. Of a process on another machine that is not known here."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return bool(process.create_time() != self.born_s or process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def in_a_line(error: BaseException) -> str:
    """An error as other ranks tell it. Ctrl-C has no words of its own."""
    words = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
