"""What Inductor makes of a decode step for a GPU, read on a machine without one: the whole step is one CUDA graph, the
device decides within it, and nothing that is large is copied."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from moe_offload.apps.families.quantised.kinds import KINDS
from tests.paths import ROOT

pytest.importorskip("triton")
PRODUCTS = ("grouped_mm", "gated_mm", "packed_mm", "packed_gated_mm")


@dataclass
class Step:
    code: str
    graphs: int
    layers: int
    partitions: int
    kernels: dict[str, int]
    mutated: list[int]
    static: list[int]

    @property
    def recorded(self):
        """The code that the CUDA graph is recorded from."""
        return self._body("def partition_0(")

    @property
    def left_out(self):
        """The code around it, which runs at every step."""
        return self._body("def call(self, args)")

    @property
    def launches(self):
        """What is launched from one decision of the device to the next, a layer's work: topk, and what decides, are
        two kernels each."""
        calls = re.findall(
            r"triton_\w+(?=\.run\()|extern_kernels\.\w+(?=\()|torch\.ops\.\w+\.\w+\.\w+(?=\()", self.recorded
        )
        first, second = [i for i, call in enumerate(calls) if re.search(r"moe_offload\.place(_top)?\.", call)][:2]
        kernels = {"topk": 2, "place": 2, "place_top": 2, "place_ahead": 2}  # and two more where it ends
        names = [call.split(".")[-2] if call.startswith("torch.ops") else "" for call in calls]
        between = range(first + 1, second + 1)
        return [calls[i] for i in between for _ in range(kernels.get(names[i], 1))]

    def _body(self, head):
        lines = self.code[self.code.index(head) :].splitlines()
        lines = [line for line in lines if not line.lstrip().startswith("#")]
        indent = len(lines[1]) - len(lines[1].lstrip())
        end = next(
            (i for i, line in enumerate(lines[1:], 1) if line.strip() and not line.startswith(" " * indent)), None
        )
        return "\n".join(lines[:end])


FAMILIES = ("qwen3_moe", "mxfp4", "gpt_oss", "deepseek_v3", "fp8")
SHORT = {("qwen3_moe", False), ("mxfp4", False), ("qwen3_moe", True)}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, ahead), id=name + "-ahead" * ahead, marks=[pytest.mark.long] * ((name, ahead) not in SHORT))
        for ahead in (False, True)
        for name in FAMILIES
    ],
)
def drawn(request):
    """A family, and whether it looks ahead."""
    return request.param


@pytest.fixture(scope="module")
def step(drawn):
    family, ahead = drawn
    child = [sys.executable, "-m", "tests.fakes.generated_child", family, *["lookahead"] * ahead]
    done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return Step(**json.loads(done.stdout.splitlines()[-1]))


def test_a_step_is_one_cuda_graph_and_the_device_decides_in_it(step):
    assert step.graphs == 1 and step.partitions == 1
    for ops, each in ((("place", "place_top"), 1), (PRODUCTS, 2)):
        calls = [step.recorded.count(f"torch.ops.moe_offload.{name}.default(") for name in ops]
        assert sum(calls) == step.layers * each


def test_packed_rows_are_unpacked_by_the_products_alone(step, drawn):
    packed = re.findall(r"moe_offload\.packed_\w+\.default\(", step.recorded)
    assert len(packed) == (2 * step.layers if drawn[0] in KINDS else 0) and "moe_offload.unpack." not in step.recorded


#: Kernels of one layer, its attention included (of gpt_oss and deepseek_v3 written out). Each costs 2 us or more.
MOST_LAUNCHES = {"qwen3_moe": 15, "gpt_oss": 30, "deepseek_v3": 29, "mxfp4": 22, "fp8": 15}


#: Of a guess whose router is asked before the first decision: which experts are missing, their copy beside, and up to
#: three that were launched together with others, and no more (mxfp4).
GUESS_LAUNCHES = 5


def test_few_kernels_are_launched_a_layer(step, drawn):
    family, ahead = drawn
    assert 10 < len(step.launches) <= MOST_LAUNCHES[family] + GUESS_LAUNCHES * ahead, step.launches
    assert "sort" not in " ".join(step.launches), "pairs are taken in any order"


def test_a_guess_is_loaded_after_what_was_asked_for_and_before_the_products(step, drawn):
    """And within the one graph; so what it begins beside ends in it, too."""
    calls = re.findall(r"moe_offload\.(place_ahead|place|\w+_mm)(?:_top)?\.default\(", step.recorded)
    guess, products = ["place_ahead"] * drawn[1], [call for call in calls[:4] if call.endswith("_mm")][:2]
    assert calls == [*["place", *guess, *products] * (step.layers - 1), "place", *products] and len(products) == 2
    assert "prefetch" not in step.code


def test_every_kernel_compiles_for_a_gpu(step):
    launched = set(re.findall(r"(triton_\w+)\.run\(", step.recorded))
    assert launched and launched <= set(step.kernels) and all(step.kernels.values())


def test_nothing_is_left_outside_that_copies_or_computes(step):
    assert "partitions[0]" in step.left_out
    for call in ("moe_offload", "extern_kernels", ".run(", "copy_(", "DeviceCopy", "clone"):
        assert call not in step.left_out, call


def test_no_bank_is_copied(step):
    """A copy would be as large as all slots of a layer, at each step, and unknown to `place` besides."""
    placed = re.findall(r"moe_offload\.place(?:_top|_ahead)?\.default\(.*, (\w+)\)", step.recorded)
    assert len(set(placed)) == step.layers
    assert all(bank.startswith("arg") for bank in placed), "an input of the graph itself"
    assert "copy_(" not in step.recorded and "clone(" not in step.recorded


def test_what_is_mutated_stays_where_it_is(step):
    assert len(step.mutated) >= 3 * step.layers  # a bank, keys and values
    assert set(step.mutated) <= set(step.static)
