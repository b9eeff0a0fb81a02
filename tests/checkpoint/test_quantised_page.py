"""docs/quantised.md says what is read and what is refused, as the code has it."""

from __future__ import annotations

from moe_offload.checkpoint.quantised.methods import PACKED, REFUSED
from tests.fakes.quantised_checkpoints import KINDS
from tests.paths import ROOT

LINES = (ROOT / "docs" / "quantised.md").read_text(encoding="utf-8").splitlines()


def test_every_refusal_stands_there_with_its_reason():
    assert [method for method, why in REFUSED.items() if f"| {method} | {why} |" not in LINES] == []


def test_every_tested_pair_of_format_and_family_stands_there_and_no_other():
    rows = [line.split("|")[2:4] for line in LINES if line.startswith("|") and line.count("|") == 5 and "`" in line]
    said = {(cell.split("`")[1], family) for cell, families in rows for family in families.strip().split(", ")}
    tested = {(str(kind.config["quant_method"]), kind.family) for kind in KINDS.values()}
    assert said == tested and {method for method, _ in said} == set(PACKED)
