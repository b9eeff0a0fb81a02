"""The support table: every MoE family of the installed transformers, exact or refused, with the reason."""

from __future__ import annotations

import json
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as hf_logging

from ...errors import ConfigError
from .check import MATRIX, QUICK, FamilyResult, check_family
from .quantised.check import QuantisedResult, check_quantised
from .quantised.page import pairs
from .tiny import available_families, unlisted_families

Row = TypeVar("Row", FamilyResult, QuantisedResult)


def check_families(
    names: Sequence[str], *, compile: str, matrix: bool, jobs: int, done: Callable[[FamilyResult], object]
) -> list[FamilyResult]:
    """Check `names` (all families when empty): a row each, in the order of the names; `done` has each as it comes.

    Dynamo traces in Python, so the work is spread over `jobs` processes of one thread each. Raises ConfigError for a
    name that is no family.
    """
    known = available_families()
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"{unknown[0]!r} is no MoE family of the installed transformers; there are {', '.join(known)}"
        )
    wanted = list(names or known)
    new = [FamilyResult(name, "refused", "not in the table of tiny models yet", "") for name in unlisted_families()]
    for row in new if not names else ():
        done(row)
    return _spread(_checked, [(name, matrix, compile) for name in wanted], jobs, done) + ([] if names else new)


def check_quantised_families(
    names: Sequence[str], *, jobs: int, done: Callable[[QuantisedResult], object]
) -> list[QuantisedResult]:
    """Check every format with `names` (all families that are tried when empty), as `check_families` does."""
    return _spread(_checked_quantised, pairs(names), jobs, done)


def _spread(check: Callable[..., Row], tasks: Sequence[Any], jobs: int, done: Callable[[Row], object]) -> list[Row]:
    """What `check` returns for each of `tasks`, its arguments, in their order; `done` has each as it comes."""
    spawn = multiprocessing.get_context("spawn")  # a forked child would inherit torch's threads, dead
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=spawn, initializer=_quiet) as pool,
    ):
        bar = progress.add_task("Families", total=len(tasks))
        futures = [pool.submit(check, *task) for task in tasks]
        for future in as_completed(futures):
            done(future.result())
            progress.advance(bar)
    return [future.result() for future in futures]


def check_foreign_folders(folders: Sequence[Path], *, done: Callable[[FamilyResult], object]) -> list[FamilyResult]:
    """A row for each folder with code of its own, in their order; `done` has each as it comes."""
    from .foreign import check_foreign

    rows = []
    for folder in folders:
        try:
            row = check_foreign(folder)
        except Exception as error:  # one folder that breaks must not hide the others
            row = FamilyResult(folder.name, "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}", "")
        rows.append(row)
        done(row)
    return rows


def format_line(row: FamilyResult) -> str:
    """One family as a line of text."""
    experts = f"{row.experts} experts, top-{row.top_k}" if row.experts else ""
    runs = f"{row.cases} runs" if row.cases else ""
    return f"{row.family:<22}{row.status:<10}{runs:<9}{experts:<22}{row.reason}".rstrip()


def quantised_line(row: QuantisedResult) -> str:
    """One pair of format and family as a line of text."""
    return f"{row.format:<47}{row.family:<13}{row.status:<11}{row.reason}".rstrip()


def format_totals(rows: Sequence[FamilyResult]) -> str:
    exact, refused = (sum(row.status == status for row in rows) for status in ("exact", "refused"))
    return f"{exact} exact, {refused} refused, {len(rows) - exact - refused} different or failed"


def markdown_table(rows: Sequence[FamilyResult]) -> str:
    """The table of docs/families.md."""
    import transformers

    heads = ("family", "model", "status", "reason")
    lines = [heads, ["---"] * len(heads), *((f"`{r.family}`", r.model, r.status, r.reason) for r in rows)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)
    return f"{table}\n\n{format_totals(rows)}, with transformers {transformers.__version__}."


def rows_json(rows: Sequence[FamilyResult] | Sequence[QuantisedResult]) -> str:
    return json.dumps([row.asdict() for row in rows])


def _quiet() -> None:
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    logging.getLogger("moe_offload").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # tiny random models set off advice that is meant for real ones


def _checked(name: str, matrix: bool, compile: str) -> FamilyResult:
    try:
        return check_family(name, MATRIX if matrix else QUICK, compile=compile)
    except Exception as error:  # one family that breaks must not hide the others
        return FamilyResult(name, "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}", "")
    finally:
        torch._dynamo.reset()


def _checked_quantised(format: str, family: str) -> QuantisedResult:
    try:
        return check_quantised(format, family)
    except Exception as error:  # as above
        return QuantisedResult(format, family, "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    finally:
        torch._dynamo.reset()
