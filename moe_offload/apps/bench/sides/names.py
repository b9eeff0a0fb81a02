"""What the sides of a comparison are called, by device: known before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable

from ....errors import ConfigError

NAMES = {
    "cpu": ("resident", "ours", "accelerate", "mmap"),
    "cuda": ("resident", "ours", "ours-host", "accelerate"),
}


def check_sides(sides: Iterable[str], device: str) -> None:
    """Raises ConfigError for a side that the device does not have, whatever residency it is wanted at."""
    known = NAMES[device]
    for named in sides:
        side = named.partition("@")[0]
        if side not in known:
            raise ConfigError(f"--sides {side}: for --device {device} there are {', '.join(known)}")
