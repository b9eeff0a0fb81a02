"""Memory of a process: a hard limit around it where the system lets us, and the most it has held."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from ...generate.speed import peak_memory_bytes

CGROUPS = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")
PREFIX = "moe_offload-bench-"
KIB = 1024


class MemoryLimit:
    """A cgroup (v1 or v2) of one process. What it held before does not count; what it takes from now on does.

    `enforced` says what was done; it begins with "none" where the system does not let us.
    """

    def __init__(self, pid: int, nbytes: int):
        self.group: Path | None = None
        v1, v2 = CGROUPS / "memory", CGROUPS
        _sweep(v1)
        _sweep(v2)
        try:
            if (v1 / "memory.limit_in_bytes").exists():
                self._enter(v1, pid, {"memory.limit_in_bytes": nbytes})
                self.enforced = "cgroup v1"
            elif "memory" in (v2 / "cgroup.subtree_control").read_text().split():
                self._enter(v2, pid, {"memory.max": nbytes, "memory.swap.max": 0})
                self.enforced = "cgroup v2"
            else:
                self.enforced = "none: the memory controller of cgroup v2 is not delegated here"
        except OSError as error:
            self.close()
            self.enforced = f"none: {error}"

    def _enter(self, root: Path, pid: int, settings: dict[str, int]) -> None:
        self.group = root / f"{PREFIX}{pid}"
        self.group.mkdir()
        for name, value in settings.items():
            with contextlib.suppress(FileNotFoundError):  # memory.swap.max, on a kernel without swap accounting
                (self.group / name).write_text(str(value))
        (self.group / "cgroup.procs").write_text(str(pid))

    def peak_bytes(self) -> int | None:
        """The most that the process has held, pages of files that it has read included; None where nobody counts."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with contextlib.suppress(OSError):
                if self.group is not None:
                    return int((self.group / name).read_text())
        return None

    def close(self) -> None:
        """Remove the group. Its process must have ended."""
        if self.group is not None:
            with contextlib.suppress(OSError):
                self.group.rmdir()
            self.group = None


def resident_bytes() -> int:
    """What this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most it has held since `reset_peak`, files mapped into it included; where there is no /proc, in its life."""
    return _status("VmHWM") if STATUS.exists() else peak_memory_bytes()


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # not ours to write in some containers: the peak is then that of all its life
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * KIB
    raise OSError(f"/proc/self/status has no {name}")


def _sweep(root: Path) -> None:
    """Remove the groups of sides that have ended, whose bench was killed. One with a process in it stays."""
    for group in root.glob(f"{PREFIX}*"):
        pid = group.name.removeprefix(PREFIX)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):
                group.rmdir()
