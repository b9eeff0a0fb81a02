"""Which versions of what is traced this was tested with; of newer ones a warning, once.

The rewrite looks at graphs that torch makes of transformers' code. A version that traces something else is refused by
name where we see it, but nobody has looked at what a version brings that came out after this one.
"""

from __future__ import annotations

import functools
import logging
import re
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger("moe_offload")

#: The newest minor version of each that the tests were run with.
NEWEST = {"torch": (2, 14), "transformers": (5, 24), "accelerate": (1, 15)}


@functools.cache
def warn_of_untested_versions() -> None:
    """Say which of the installed packages are newer than what was tested. Once in a process."""
    newer = [f"{name} {found}" for name in NEWEST if _minor(found := _installed(name)) > NEWEST[name]]
    if newer:
        tested = ", ".join(f"{name} up to {major}.{minor}" for name, (major, minor) in NEWEST.items())
        logger.warning(
            "moe_offload was tested with %s; installed: %s. Compare its first tokens with those of plain "
            "transformers, or install a tested version (docs/versions.md)",
            tested, ", ".join(newer),
        )  # fmt: skip


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _minor(text: str) -> tuple[int, ...]:
    """ "2.14.0+cpu" as (2, 14); nothing where it cannot be read."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return () if found is None else (int(found[1]), int(found[2]))
