"""How much main memory this process can have: that of the machine, or less where a cgroup bounds it.

    Linux    MemAvailable; of each cgroup around the process its limit, less what it holds and could not drop
    macOS    all but what is wired, anonymous or compressed (by `vm_stat`): psutil's `available` counts inactive pages,
             most of which belong to somebody
    others   psutil's `available`

Where several say something the least counts. All in bytes.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
NO_LIMIT = 2**60  # cgroup v1 writes 2**63 less a page
VM_STAT_S = 5.0
HELD_PAGES = ("Anonymous pages", "Pages wired down", "Pages occupied by compressor")


@dataclass(frozen=True)
class Memory:
    """`total` is the most this process could ever have, `free` what it could have now; `bound` says what bounds it."""

    total: int
    free: int
    bound: str = "this machine's memory"


def main_memory() -> Memory:
    """The main memory that this process can have, now."""
    found = [_machine(), *_groups()]
    least = min(found, key=lambda memory: memory.total)
    return Memory(least.total, max(0, min(memory.free for memory in found)), least.bound)


def _machine() -> Memory:
    memory = psutil.virtual_memory()
    free = memory.available
    if sys.platform == "darwin":
        held = _held_on_macos()
        free = memory.available - memory.inactive if held is None else memory.total - held
    return Memory(memory.total, free)


def _held_on_macos() -> int | None:
    """What is in use and not the cache of files; None where `vm_stat` does not say."""
    try:
        told = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=VM_STAT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    page = re.search(r"page size of (\d+) bytes", told)
    pages = {name: int(count) for name, count in re.findall(r'^"?([^":]+)"?:\s+(\d+)\.$', told, re.MULTILINE)}
    if page is None or not set(HELD_PAGES) <= set(pages):
        return None
    return int(page[1]) * (sum(pages[name] for name in HELD_PAGES) - pages.get("Pages purgeable", 0))


def _groups() -> Iterator[Memory]:
    """Every cgroup around this process that has a limit."""
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from _around(CGROUPS, path, ("memory.max", "memory.high"), "memory.current", "")
            elif "memory" in controllers.split(","):
                yield from _around(
                    CGROUPS / "memory", path, ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"
                )


def _around(root: Path, path: str, limits: tuple[str, ...], used: str, prefix: str) -> Iterator[Memory]:
    """The group at `path` and those that it is in. A container may have the host's name for it, and the root alone."""
    below = Path(path.lstrip("/"))
    for group in (root / below, *(root / parent for parent in below.parents)):
        found = [limit for name in limits if (limit := _number(group / name)) is not None and limit < NO_LIMIT]
        held = _number(group / used)
        if found and held is not None:
            cached = _cached(group / "memory.stat", prefix)
            yield Memory(min(found), min(found) - max(0, held - cached), "the memory limit of this process's cgroup")


def _cached(stat: Path, prefix: str) -> int:
    """Bytes of files in the page cache: counted as used, and dropped for whoever needs memory."""
    with contextlib.suppress(OSError, ValueError):
        pairs = (line.split() for line in stat.read_text().splitlines())
        return sum(int(n) for name, n in pairs if name in (f"{prefix}active_file", f"{prefix}inactive_file"))
    return 0


def _number(file: Path) -> int | None:
    """The number in `file`; None where there is none ("max"), or no such file."""
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None
