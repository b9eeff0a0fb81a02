"""What the kernel library may keep is bounded before the first kernel, and a user's own setting stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moe_offload.memory.process_memory import SET_BY, bound_kernel_caches, kept_kernels
from tests.paths import ROOT

PROGRAM = """
import os, sys, torch, moe_offload
from moe_offload.apps.families.tiny import build
model = build("qwen3_moe", dtype=torch.bfloat16)
moe_offload.optimize(model, "200MB", device_map="cpu")
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"])
def held(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
weight = torch.randn(64, 96).bfloat16()
def work(begin):
    for rows in range(begin, begin + 600): torch.mm(torch.randn(rows, 64).bfloat16(), weight)
work(1); before = held(); work(601); print(held() - before)
"""


def run(**settings):
    environment = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")} | settings
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bounded_unless_the_user_says_otherwise():
    onednn, ideep, grown = run()
    assert (onednn, ideep) == ("38", "38")  # an eighth of 200 MB
    onednn, ideep, grown_much = run(ONEDNN_PRIMITIVE_CACHE_CAPACITY="4096", LRU_CACHE_CAPACITY="4096")
    assert (onednn, ideep) == ("4096", "4096")
    if float(grown_much) < 30:
        pytest.skip("this processor's kernels are small")
    assert float(grown) < float(grown_much) / 3


def test_a_process_that_another_started_chooses_by_its_own_budget(monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "128")
    monkeypatch.setenv(SET_BY, "1:128")  # what a parent with a budget of 16 GB leaves in its children's environment
    bound_kernel_caches(6 * 10**6)
    assert os.environ["LRU_CACHE_CAPACITY"] == os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "16"
    bound_kernel_caches(16 * 10**9)  # a second model in this process: the first one's budget counts
    assert os.environ["LRU_CACHE_CAPACITY"] == "16"


def test_what_the_user_set_beside_a_parents_choice_stays(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv(SET_BY, "1:128")
    bound_kernel_caches(6 * 10**6)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "4096"
    assert os.environ["LRU_CACHE_CAPACITY"] == "16"


def test_a_small_budget_keeps_few_kernels():
    assert [kept_kernels(budget * 10**6) for budget in (6, 30, 300, 666, 16_000)] == [16, 16, 57, 128, 128]
