"""The support table: every MoE family of the installed transformers, exact or refused, with the reason."""

from __future__ import annotations

import json
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as hf_logging

from .check import MATRIX, QUICK, FamilyResult, check
from .tiny import available, unlisted


def run_families(
    names: Sequence[str], *, compile: str, matrix: bool, as_json: bool, jobs: int, fail: Callable[[str], object]
) -> bool:
    """Check `names` (all families when empty), print the table or its JSON rows; whether every one is exact or refused.

    Dynamo traces in Python, so the work is spread over `jobs` processes of one thread each.
    """
    known = available()
    for name in names:
        if name not in known:
            fail(f"{name!r} is no MoE family of the installed transformers; there are {', '.join(known)}")
    wanted = list(names or known)
    rows: dict[str, FamilyResult] = {}
    spawn = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads, dead
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=spawn, initializer=_quiet) as pool,
    ):
        bar = progress.add_task("Families", total=len(wanted))
        for future in as_completed([pool.submit(_checked, name, matrix, compile) for name in wanted]):
            rows[future.result().family] = future.result()
            progress.advance(bar)
    found = [rows[name] for name in wanted]
    found += [
        FamilyResult(name, "refused", "not in the table of tiny models yet", "")
        for name in ([] if names else unlisted())
    ]
    if as_json:
        print(json.dumps([row.asdict() for row in found]))
    else:
        Console(width=150).print(table(found))
    return all(row.status in ("exact", "refused") for row in found)


def table(rows: Sequence[FamilyResult]) -> Table:
    exact = sum(row.status == "exact" for row in rows)
    refused = sum(row.status == "refused" for row in rows)
    found = Table(title=f"{exact} exact, {refused} refused, {len(rows) - exact - refused} different or failed")
    for column in ("family", "model", "MoE layers", "experts", "top-k", "status", "runs", "reason"):
        found.add_column(column)
    for row in rows:
        facts = [str(n) if n else "" for n in (row.moe_layers, row.experts, row.top_k)]
        found.add_row(row.family, row.model, *facts, row.status, str(row.cases or ""), row.reason)
    return found


def _quiet() -> None:
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    logging.getLogger("moe_offload").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # tiny random models set off advice that is meant for real ones


def _checked(name: str, matrix: bool, compile: str) -> FamilyResult:
    try:
        return check(name, MATRIX if matrix else QUICK, compile=compile)
    except Exception as error:  # one family that breaks must not hide the others
        return FamilyResult(name, "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}", "")
    finally:
        torch._dynamo.reset()
