"""Kernels run on torch's own threads; where they cannot be had, or the processor is another, the bits are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_offload.packed import formats
from tests.packed.matrices import CASES, case, same_bits

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environment: str) -> str:
    """What a process of its own prints."""
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


ALL_CASES = """
import torch
from tests.packed.matrices import CASES, case, same_bits
for name in CASES:
    found = case(name)
    out = torch.full(found.format.shape(found.tensors), 7.0, dtype=torch.bfloat16)
    found.format.unpack(found.tensors, out)
    assert same_bits(out, found.plain(found.tensors, torch.bfloat16)), name
    turned = torch.full((out.shape[1], out.shape[0]), 7.0, dtype=torch.bfloat16)
    found.format.unpack_turned(found.tensors, turned)
    assert same_bits(turned, out.t()), name
"""


def test_two_threads_are_the_two_of_torch():
    """After a product of torch's, kernels start no thread, and two of them share the rows."""
    run_python(
        """
import os, torch
from moe_offload.packed.compiled import pool
import tests.packed.threads as threads
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)
before = set(os.listdir("/proc/self/task"))
rows = torch.zeros(1000, dtype=torch.int64)
pool.run(threads.say_thread, 1000, [rows.data_ptr(), 1000], work=1 << 20)
assert set(os.listdir("/proc/self/task")) == before
assert rows[:500].eq(1).all() and rows[500:].eq(2).all(), rows
rows.zero_()
pool.run(threads.say_thread, 1000, [rows.data_ptr(), 1000], work=1)
assert rows.eq(1).all(), "small work is done by one thread"
""",
        OMP_NUM_THREADS="2",
    )


def test_three_threads_leave_no_row_out():
    all_threads = (
        "import torch\nfrom moe_offload.packed.compiled import pool\ntorch.set_num_threads(3)\npool.SMALL = 0\n"
    )
    run_python(all_threads + ALL_CASES)


def test_a_processor_without_wide_vectors_computes_the_same_bits(tmp_path):
    """What a laptop does: compiled for the least of these processors."""
    run_python(ALL_CASES, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))


def test_without_a_pool_one_thread_does_it(monkeypatch):
    pool = pytest.importorskip("moe_offload.packed.compiled.pool")
    monkeypatch.setattr(pool, "_openmp", lambda: None)
    monkeypatch.setattr(pool, "SMALL", 0)
    for name in CASES:
        found = case(name)
        out = torch.empty(found.format.shape(found.tensors), dtype=torch.bfloat16)
        found.format.unpack(found.tensors, out)
        assert same_bits(out, found.plain(found.tensors, torch.bfloat16)), name


def test_without_numba_the_bits_are_the_same():
    run_python("import sys\nsys.modules['numba'] = None\n" + ALL_CASES)


def test_without_a_folder_for_compiled_code(tmp_path):
    """A locator that finds no folder is what numba meets in a read-only installation without a home."""
    said = run_python(
        """
from numba.core import caching
caching.CacheImpl._locator_classes = []
import torch
from tests.packed.matrices import case, same_bits
found = case("mxfp4 many groups")
out = torch.empty(found.format.shape(found.tensors), dtype=torch.bfloat16)
found.format.unpack(found.tensors, out)
from moe_offload.packed.compiled import unpack
print(type(unpack._mxfp4.made._cache).__name__)
assert same_bits(out, found.plain(found.tensors, torch.bfloat16))
"""
    )
    assert said.strip() == "NullCache"


def test_whoever_unpacks_nothing_waits_for_no_compiler():
    run_python("import sys, moe_offload, moe_offload.packed\nassert 'numba' not in sys.modules")


def test_mxfp4_is_turned_in_one_step(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(formats.Format, "unpack", lambda *_: pytest.fail("it was unpacked first"))
    found = case("mxfp4 many groups")
    found.format.unpack_turned(found.tensors, torch.empty(288, 100, dtype=torch.bfloat16))


def test_kernels_are_taken_where_they_can_be(monkeypatch):
    """A mistake in the choice would be slow, and no other test would see it."""
    pytest.importorskip("numba")
    monkeypatch.setattr(formats.Format, "unpack_torch", lambda *_: pytest.fail("the formula in torch was taken"))
    for name in set(CASES) - {"int4 groups of float16 scales"}:
        found = case(name)
        found.format.unpack(found.tensors, torch.empty(found.format.shape(found.tensors), dtype=torch.bfloat16))


@pytest.mark.parametrize("size", [0, 5, 4096, 3 * 4096 + 7])
@pytest.mark.parametrize("offset", range(4))
def test_a_byte_is_found_wherever_it_is(size, offset):
    whole = torch.zeros(size + 8, dtype=torch.uint8)
    part = whole[offset : offset + size]
    whole[offset + size :] = 0xFF  # beyond its end
    for signed in (False, True):
        assert not formats.has_byte(part, signed=signed)
        for place in {0, size // 2, size - 1} if size else ():
            for byte in (0x7F, 0xFF, 0xFE, 0x80, 0x01):
                part[place] = byte
                assert formats.has_byte(part, signed=signed) == (byte == 0xFF or (signed and byte == 0x7F))
                part[place] = 0
