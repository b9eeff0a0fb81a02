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
        first, second = [i for i, call in enumerate(calls) if "ops.moe_offload.place" in call][:2]
        twice = re.compile(r"torch\.ops\.\w+\.(topk|place\w*)\.")
        return [call for call in calls[first + 1 : second + 1] for _ in range(2 if twice.match(call) else 1)]

    def _body(self, head):
        lines = self.code[self.code.index(head) :].splitlines()
        lines = [line for line in lines if not line.lstrip().startswith("#")]
        indent = len(lines[1]) - len(lines[1].lstrip())
        end = next(
            (i for i, line in enumerate(lines[1:], 1) if line.strip() and not line.startswith(" " * indent)), None
        )
        return "\n".join(lines[:end])


FAMILIES = [
    "qwen3_moe",
    "mxfp4",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("gpt_oss", "deepseek_v3", "fp8")),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def step(family):
    child = [sys.executable, "-m", "tests.fakes.generated_child", family]
    done = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return Step(**json.loads(done.stdout.splitlines()[-1]))


def test_a_step_is_one_cuda_graph_and_the_device_decides_in_it(step):
    assert step.graphs == 1 and step.partitions == 1
    for ops, each in ((("place", "place_top"), 1), (PRODUCTS, 2)):
        calls = [step.recorded.count(f"torch.ops.moe_offload.{name}.default(") for name in ops]
        assert sum(calls) == step.layers * each


def test_packed_rows_are_unpacked_by_the_products_alone(step, family):
    packed = re.findall(r"moe_offload\.packed_\w+\.default\(", step.recorded)
    assert len(packed) == (2 * step.layers if family in KINDS else 0) and "moe_offload.unpack." not in step.recorded


#: Kernels of one layer, its attention included (of gpt_oss and deepseek_v3 written out). Each costs 2 us or more.
MOST_LAUNCHES = {"qwen3_moe": 15, "gpt_oss": 30, "deepseek_v3": 29, "mxfp4": 22, "fp8": 15}


def test_few_kernels_are_launched_a_layer(step, family):
    assert 10 < len(step.launches) <= MOST_LAUNCHES[family], step.launches
    assert "sort" not in " ".join(step.launches), "pairs are taken in any order"


def test_every_kernel_compiles_for_a_gpu(step):
    launched = set(re.findall(r"(triton_\w+)\.run\(", step.recorded))
    assert launched and launched <= set(step.kernels) and all(step.kernels.values())


def test_nothing_is_left_outside_that_copies_or_computes(step):
    assert "partitions[0]" in step.left_out
    for call in ("moe_offload", "extern_kernels", ".run(", "copy_(", "DeviceCopy", "clone"):
        assert call not in step.left_out, call


def test_no_bank_is_copied(step):
    """A copy would be as large as all slots of a layer, at each step, and unknown to `place` besides."""
    placed = re.findall(r"moe_offload\.place(?:_top)?\.default\(.*, (\w+)\)", step.recorded)
    assert len(set(placed)) == step.layers
    assert all(bank.startswith("arg") for bank in placed), "an input of the graph itself"
    assert "copy_(" not in step.recorded and "clone(" not in step.recorded


def test_what_is_mutated_stays_where_it_is(step):
    assert len(step.mutated) >= 3 * step.layers  # a bank, keys and values
    assert set(step.mutated) <= set(step.static)
