"""Sizes in bytes, as people write them.

    "8GB" = 8 * 10**9        "8GiB" = "8g" = "8192M" = 8 * 2**30        "1e9"        "80%", "auto" (90 %) of a total

A lone letter is binary, as docker, systemd and Java read it. Letter case never matters and a size is always bytes.
(accelerate's own parser reads "8gb" as bits, an eighth of "8GB".)
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from ..errors import ConfigError

DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LETTERS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

#: "auto" leaves the rest to whatever else runs on the device.
AUTO_PERCENT = Decimal(90)

#: File offsets and tensor sizes are signed 64-bit: nothing larger can be addressed.
LARGEST = 2**63 - 1

ACCEPTED = '8000000000 (bytes), "8GB" (decimal), "8GiB" or "8g" (binary), KB to TB, KiB to TiB, "80%" or "auto"'


def parse_size(text: int | str, *, total: int | None = None) -> int:
    """The number of bytes that `text` means: at least 1.

    `total` (bytes) is what "80%" and "auto" are a part of; without it these two are refused.
    Fractions of a byte are dropped. Raises ConfigError for anything else, naming what was given and what is accepted.
    """
    try:
        return _parse(text, total)
    except _WrongSizeError as wrong:
        raise ConfigError(f"size {str(text)[:64]!r} is not usable: {wrong}. Accepted: {ACCEPTED}") from None


def size_problem(text: object, *, total: int | None = None) -> str | None:
    """What is wrong with `text` as a size, in words; None if nothing is."""
    try:
        _parse(text, total)
    except _WrongSizeError as wrong:
        return str(wrong)
    return None


def parse_share(text: float | str) -> float:
    """A share of the experts: "25%" or 0.25 as 0.25. Raises ConfigError, saying what is wrong with it."""
    plain = str(text).strip()
    try:
        share = float(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if 0 < share <= 1:
        return share
    if not plain:
        wrong = "it is empty"
    elif math.isnan(share):
        wrong = "that is no number"
    elif share <= 0:
        wrong = "a share is above 0"
    else:
        wrong = "a share is 100% at most" + ("" if plain.endswith("%") or share > 100 else f": {plain}% ?")
    raise ConfigError(f"{str(text)[:64]!r} is no share of the experts: {wrong}; write it as 25% or 0.25")


def format_size(n: int, *, both: bool = False) -> str:
    """`n` bytes in decimal units, "8.00 GB"; with `both`, as settings are echoed: "8.00 GB (7.45 GiB)"."""
    text = _in_units(n, DECIMAL, 1000)
    return f"{text} ({_in_units(n, BINARY, 1024)})" if both else text


class _WrongSizeError(Exception):
    """Why something is no size."""


def _parse(text: object, total: int | None) -> int:
    size = Decimal(text) if isinstance(text, int) and not isinstance(text, bool) else _from_text(text, total)
    if size < 0:
        raise _WrongSizeError("a size is not negative")
    if size < 1:
        raise _WrongSizeError("0 bytes hold nothing" if size == 0 else "that is less than one byte")
    if size > LARGEST:
        raise _WrongSizeError("that is more than 2**63 - 1 bytes")
    return int(size)


def _from_text(text: object, total: int | None) -> Decimal:
    if not isinstance(text, str):
        raise _WrongSizeError(f"a {type(text).__name__} is not a size")
    plain = text.strip()
    if plain.upper() == "AUTO":
        return _part(AUTO_PERCENT, total)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,3})?)\s*(%|[A-Za-z]*)", plain)
    if match is None:
        raise _WrongSizeError(_unreadable(plain))
    number, unit = Decimal(match[1]), match[2]
    if unit == "%":
        return _part(number, total)
    factor = (DECIMAL | BINARY | LETTERS).get(unit.upper() or "B")
    if factor is None:
        raise _WrongSizeError(f"the unit {unit[:8]!r} is unknown{_meant(match[1], unit)}")
    return number * factor


def _unreadable(plain: str) -> str:
    """What is wrong with text that is not a number and a unit."""
    if not plain:
        return "it is empty"
    if re.fullmatch(r"-[0-9][^-]*", plain):
        return f"a size is not negative: write {plain[1:][:16]}"
    if re.fullmatch(r"[0-9]+,[0-9]+\s*(%|[A-Za-z]*)", plain):
        return f"a decimal point is a point: write {plain.replace(',', '.')[:16]}"
    return "what follows the number cannot be read" if re.match("[0-9]", plain) else "it does not begin with a number"


def _meant(number: str, unit: str) -> str:
    prefix = unit[0].upper()
    return f": write {number[:16]}{prefix}B (decimal) or {number[:16]}{prefix}iB (binary)" if prefix in "KMGT" else ""


def _part(percent: Decimal, total: int | None) -> Decimal:
    if total is None:
        raise _WrongSizeError("there is no total here to take a part of")
    if percent > 100:
        raise _WrongSizeError("that is more than all there is: 100% at most")
    return total * percent / 100


def _in_units(n: int, units: dict[str, int], base: int) -> str:
    if abs(n) < base:
        return f"{n} B"
    # Rounded before it is compared, so that 999_999 is "1.00 MB" and never "1000.00 KB".
    fitting = (unit for unit, factor in units.items() if round(abs(n) / factor, 2) < base)
    unit = next(fitting, list(units)[-1])
    return f"{n / units[unit]:.2f} {unit.replace('I', 'i')}"
