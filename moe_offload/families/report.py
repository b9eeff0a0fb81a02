"""The support table: every MoE family of the installed transformers, exact or refused, with the reason."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as hf_logging

from .check import MATRIX, SLICE, Row, check
from .tiny import available, unlisted


def run_families(
    names: Sequence[str], *, compile: str, matrix: bool, as_json: bool, fail: Callable[[str], object]
) -> bool:
    """Check `names` (all families when empty), print the table or its JSON rows; whether every one is "
    "exact or refused."""
    known = available()
    for name in names:
        if name not in known:
            fail(f"{name!r} is no MoE family of the installed transformers; there are {', '.join(known)}")
    rows = []
    hf_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiny random models set off advice that is meant for real ones
        for name in track(names or known, "Families", console=Console(stderr=True), transient=True):
            rows.append(_checked(name, matrix, compile))
            torch._dynamo.reset()
    rows += [Row(name, "refused", "not in the table of tiny models yet", "") for name in ([] if names else unlisted())]
    if as_json:
        print(json.dumps([row.asdict() for row in rows]))
    else:
        Console(width=150).print(table(rows))
    return all(row.status in ("exact", "refused") for row in rows)


def _checked(name: str, matrix: bool, compile: str) -> Row:
    try:
        return check(name, MATRIX if matrix else SLICE, compile=compile)
    except Exception as error:  # one family that breaks must not hide the others
        return Row(name, "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}", "")


def table(rows: Sequence[Row]) -> Table:
    exact = sum(row.status == "exact" for row in rows)
    refused = sum(row.status == "refused" for row in rows)
    found = Table(title=f"{exact} exact, {refused} refused, {len(rows) - exact - refused} different or failed")
    for column in ("family", "model", "MoE layers", "experts", "top-k", "status", "runs", "reason"):
        found.add_column(column)
    for row in rows:
        facts = [str(n) if n else "" for n in (row.moe_layers, row.experts, row.top_k)]
        found.add_row(row.family, row.model, *facts, row.status, str(row.cases or ""), row.reason)
    return found
