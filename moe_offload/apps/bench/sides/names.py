"""What the sides of a comparison are called, by device: known before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Collection

from ....errors import ConfigError

NAMES = {
    "cpu": ("resident", "ours", "accelerate", "mmap"),
    "cuda": ("resident", "ours", "ours-host", "accelerate"),
}


def check_sides(sides: Collection[str], device: str, measured: Collection[str]) -> None:
    """Raises ConfigError for a side that the device does not have, or wanted at a residency that is not measured."""
    known = NAMES[device]
    if not sides:
        raise ConfigError(f"--sides: there is nothing to measure; for --device {device} there are {', '.join(known)}")
    for named in sides:
        side, _, share = named.partition("@")
        if side not in known:
            raise ConfigError(f"--sides {side}: for --device {device} there are {', '.join(known)}")
        if share and share not in measured:
            raise ConfigError(f"--sides {named}: {share} is not among what is measured, {', '.join(measured)}")
