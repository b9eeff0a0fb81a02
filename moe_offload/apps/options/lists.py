"""Flags whose value is a list, written by commas."""

from __future__ import annotations

from ...errors import ConfigError


def split_list(flag: str, text: str, example: str) -> list[str]:
    """The parts of `text`, the value of `flag`. Raises ConfigError where one is empty: a part may be missing there."""
    parts = [part.strip() for part in text.split(",")]
    if all(parts):
        return parts
    empty = "it is empty" if len(parts) == 1 else f"part {parts.index('') + 1} of {len(parts)} is empty"
    raise ConfigError(f"{flag} {text[:64]!r}: {empty}; write it by commas, as {example}")
