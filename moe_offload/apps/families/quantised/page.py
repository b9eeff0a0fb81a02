"""The tables of docs/quantised.md: which formats are exact in which families, which methods are refused, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ....checkpoint.quantised.methods import REFUSED, check_quantization
from ....errors import ConfigError, UnsupportedModelError
from .check import QuantisedResult
from .kinds import FORMATS, SIZES, ct_config

BEGIN, END = "<!-- written by moe-offload families --quantised -->", "<!-- end of what is written -->"

#: What a checkpoint may say that is refused for it -> its quantization_config.
SAID: dict[str, Mapping[str, Any]] = {
    **{method: {"quant_method": method} for method in REFUSED},
    "compressed-tensors: NVFP4": ct_config("nvfp4-pack-quantized", type="float", group_size=16),
    "compressed-tensors: asymmetric int4": ct_config("pack-quantized", group_size=32, symmetric=False),
    "compressed-tensors: int4, activation order": ct_config("pack-quantized", group_size=32, actorder="group"),
    "compressed-tensors: FP8 by block": ct_config("float-quantized", num_bits=8, type="float", strategy="block"),
    "compressed-tensors: int8": ct_config("int-quantized", num_bits=8, strategy="channel"),
}


def pairs(families: Sequence[str]) -> list[tuple[str, str]]:
    """What is tried. Raises `ConfigError` for a family that there is no quantised checkpoint of here."""
    if unknown := [name for name in families if name not in SIZES]:
        raise ConfigError(f"{unknown[0]!r} is not tried with quantised experts; there are {', '.join(SIZES)}")
    return [(format, family) for format in FORMATS for family in families or SIZES]


def tables(rows: Sequence[QuantisedResult]) -> str:
    """Both tables, as the documentation has them, and a line for each pair that is not exact."""
    families = list(dict.fromkeys(row.family for row in rows))
    found = {(row.format, row.family): row for row in rows}
    reasons = list(dict.fromkeys(row.reason for row in rows if row.reason))
    lines = [["format", "in config.json", "of bfloat16", *families]]
    for format in dict.fromkeys(row.format for row in rows):
        tried = [found[format, family] for family in families]
        method = next((f"`{row.method}`" for row in tried if row.method), "")
        share = next((f"{row.share:.2f}" for row in tried if row.share), "")
        cells = [f"{row.status} ({reasons.index(row.reason) + 1})" if row.reason else row.status for row in tried]
        lines.append([format, method, share, *cells])
    notes = [f"({number}) {reason}." for number, reason in enumerate(reasons, 1)]
    refused = [["refused", "reason"], *([name, why] for name, why in refusals())]
    return "\n\n".join([_table(lines), *notes, _table(refused)])


def refusals() -> Iterator[tuple[str, str]]:
    """Each kind of checkpoint that is refused for what its config.json says, with the reason that is given."""
    for name, said in SAID.items():
        try:
            check_quantization("", {"quantization_config": said})
        except UnsupportedModelError as error:
            yield name, str(error).partition("that is not read: ")[2].partition(". Instead, ")[0]


def check_page(page: Path) -> tuple[str, str]:
    """What stands before and after what is written into a page. Raises `ConfigError` for one without the marks."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--into {page}: cannot be read: {error}. Give a page of text that has the marks") from error
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise ConfigError(f"--into {page}: has no line {BEGIN!r} before a line {END!r}, between which to write")
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END)[2]


def write_tables(page: Path, rows: Sequence[QuantisedResult]) -> None:
    """Replace what stands between the marks of a page. Raises as `check_page`."""
    before, after = check_page(page)
    try:
        page.write_text(f"{before}{BEGIN}\n\n{tables(rows)}\n\n{END}{after}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--into {page}: cannot be written: {error}. Give a page that may be written") from error


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rest))
