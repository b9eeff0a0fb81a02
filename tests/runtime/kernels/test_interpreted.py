"""The Triton kernels in CI: `test_contract.py` and `test_shuffled.py` under Triton's interpreter, which needs no GPU,
in a process of its own.

A slice of it always, all of it (minutes) with -m long. TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytest.importorskip("triton")
TESTS = [f"tests/runtime/kernels/test_{name}.py" for name in ("contract", "staging", "shuffled")]
SLICE = (
    "staged or half_a_row or more_chunks "
    "or renormalised or any_small or (ids_in_and_out and 10-6-4) or gather or refused "
    "or (best_experts and 9-2-3) or (equal_scores and (8-2-3 or 60-32-9)) or (gated_mm and 7-5) "
    "or (indexed_mm and 300) or (test_grouped_mm and 70-150 and (transposed or field-back))"
)


@pytest.mark.parametrize(
    ("chosen", "least"), [(SLICE, 46), pytest.param("not recorded", 142, marks=pytest.mark.long)], ids=["slice", "all"]
)
def test_the_kernels_keep_their_contract_under_the_interpreter(chosen, least):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *TESTS, "-k", f"(interpreted and ({chosen})) or shuffled"],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-500:]
