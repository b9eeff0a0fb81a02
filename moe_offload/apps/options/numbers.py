"""Options that take a number or a word out of a few: a wrong one is told what would be right, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import typer


def whole(least: int, most: int | None = None) -> dict[str, Any]:
    """Settings of a typer.Option that takes a whole number from `least` to `most`."""
    return _number(int, least, most, "a whole number")


def seconds(least: float, most: float) -> dict[str, Any]:
    """As `whole`, of seconds."""
    return _number(float, least, most, "seconds")


def number(least: float, most: float) -> dict[str, Any]:
    """As `whole`, of a number with or without decimals."""
    return _number(float, least, most, "a number")


def one_of(*words: str) -> dict[str, Any]:
    """Settings of a typer.Option that takes one of `words`."""

    def parse(text: str) -> str:
        if text not in words:
            raise typer.BadParameter(f"{text[:64]!r} is not accepted: it takes {', '.join(words)}")
        return text

    return {"parser": parse, "metavar": "NAME"}


def _number(read: Callable[[str], Any], least: float, most: float | None, what: str) -> dict[str, Any]:
    def parse(text: str) -> Any:
        try:
            found = read(str(text))  # a default comes as the number that it is
        except ValueError:
            found = None
        if found is None or not least <= found <= (math.inf if most is None else most):
            span = f"from {least} on" if most is None else f"from {least} to {most}"
            raise typer.BadParameter(f"{str(text)[:64]!r} is not accepted: it takes {what} {span}")
        return found

    return {"parser": parse, "metavar": "N"}
