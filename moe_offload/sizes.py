"""Sizes in bytes, as people write them.

    "8GB" = 8 * 10**9        "8GiB" = 8 * 2**30        "80%" of a total        "auto" = 90 % of a total

Letter case never matters and a size is always bytes. (accelerate's own parser reads "8gb" as bits, an eighth of "8GB".)
"""

from __future__ import annotations

import re
from decimal import Decimal

from .errors import ConfigError

DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

#: "auto" leaves the rest to whatever else runs on the device.
AUTO_PERCENT = Decimal(90)

#: File offsets and tensor sizes are signed 64-bit: nothing larger can be addressed.
LARGEST = 2**63 - 1

ACCEPTED = '8000000000 (bytes), "8GB" (decimal), "8GiB" (binary), KB to TB, KiB to TiB, "1.5GB", "80%" or "auto"'


def parse_size(text: int | str, *, total: int | None = None) -> int:
    """The number of bytes that `text` means: at least 1.

    `total` (bytes) is what "80%" and "auto" are a part of; without it these two are refused.
    Fractions of a byte are dropped. Raises ConfigError for anything else, naming what was given and what is accepted.
    """
    size = Decimal(text) if isinstance(text, int) and not isinstance(text, bool) else _from_text(text, total)
    if not 1 <= size <= LARGEST:
        raise _refused(text, "that is less than one byte" if size < 1 else "that is more than 2**63 - 1 bytes")
    return int(size)


def format_size(n: int, *, both: bool = False) -> str:
    """`n` bytes in decimal units, "8.00 GB"; with `both`, as settings are echoed: "8.00 GB (7.45 GiB)"."""
    text = _in_units(n, DECIMAL, 1000)
    return f"{text} ({_in_units(n, BINARY, 1024)})" if both else text


def _from_text(text: object, total: int | None) -> Decimal:
    if not isinstance(text, str):
        raise _refused(text, f"a {type(text).__name__} is not a size")
    plain = text.strip().upper()
    if plain == "AUTO":
        return _part(text, AUTO_PERCENT, total)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[A-Z]*)", plain)
    if match is None:
        raise _refused(text, "that cannot be read")
    number, unit = Decimal(match[1]), match[2]
    if unit == "%":
        return _part(text, number, total)
    factor = (DECIMAL | BINARY).get(unit or "B")
    if factor is None:
        raise _refused(text, f"the unit {unit[:8]!r} is unknown")
    return number * factor


def _part(text: str, percent: Decimal, total: int | None) -> Decimal:
    if total is None:
        raise _refused(text, "there is no total here to take a part of")
    if percent > 100:
        raise _refused(text, "that is more than all there is")
    return total * percent / 100


def _refused(given: object, why: str) -> ConfigError:
    return ConfigError(f"size {str(given)[:64]!r} is not usable: {why}. Accepted: {ACCEPTED}")


def _in_units(n: int, units: dict[str, int], base: int) -> str:
    if abs(n) < base:
        return f"{n} B"
    # Rounded before it is compared, so that 999_999 is "1.00 MB" and never "1000.00 KB".
    fitting = (unit for unit, factor in units.items() if round(abs(n) / factor, 2) < base)
    unit = next(fitting, list(units)[-1])
    return f"{n / units[unit]:.2f} {unit.replace('I', 'i')}"
