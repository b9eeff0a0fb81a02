"""The Triton kernels in CI: the files below under Triton's interpreter, which needs no GPU, in a process of their own.

A slice of it always, all of it (minutes, a process for each file) with -m long. TRITON_INTERPRET must be set before
Triton is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytest.importorskip("triton")
TESTS = [f"tests/runtime/kernels/test_{name}.py" for name in ("contract", "packed", "staging", "shuffled")]
ALL = "(interpreted and not recorded) or shuffled or every_code"
LEAST = (129, 100, 10, 12)  # how many pass of each, at least
SLICE = (
    "staged or half_a_row or more_chunks "
    "or renormalised or any_small or (ids_in_and_out and 10-6-4) or gather or refused "
    "or (best_experts and 9-2-3) or (equal_scores and (8-2-3 or 60-32-9)) or (gated_mm and 7-5) "
    "or (indexed_mm and 300) or (test_grouped_mm and 70-150 and (transposed or field-back)) "
    "or (test_gated and mxfp4-dtype0) or (one_column and channels) "
    "or (few_pairs and dtype0 and (odd or float16 or one)) or (many_pairs and any and (odd or one))"
)


@pytest.mark.parametrize(
    ("files", "chosen", "least"),
    [
        pytest.param(TESTS, f"(interpreted and ({SLICE})) or shuffled or (every_code and dtype0)", 80, id="slice"),
        *(
            pytest.param(
                [file], "(interpreted and not recorded) or shuffled or every_code", least, marks=pytest.mark.long
            )
            for file, least in zip(TESTS, LEAST, strict=True)
        ),
    ],
)
def test_the_kernels_keep_their_contract_under_the_interpreter(files, chosen, least):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *files, "-k", chosen],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-500:]
