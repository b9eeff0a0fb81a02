"""Offloaded runs of real families equal resident ones, bit for bit; what cannot be run exactly is refused by name.

CI takes families of different kinds. The rest is one command:

    python -m pytest tests/apps/families/test_exact.py -m long        every family, and a dozen through Inductor
    moe-offload families --matrix                                 every combination, for every family
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import moe_offload
from moe_offload.apps.families.check import QUICK, Case, _offloaded, _resident, check_family
from moe_offload.apps.families.session import run_session
from moe_offload.apps.families.table import FAMILIES
from moe_offload.apps.families.tiny import available_families, build
from moe_offload.experts import find_experts

#: The other halves of the pairs in QUICK, and the remaining budgets.
SLICE = (*QUICK, Case("batched_mm", "float32", 3, True, 0.25), Case("grouped_mm", "bfloat16", 3, True, 1.0))

DOZEN = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v4",
    "olmoe",
    "granitemoe",
    "phimoe",
    "zaya",
    "nemotron_h",
    "gemma4",
    "minimax",
)
LONG = ("nemotron_h", "gemma4", "zaya", "olmoe", "phimoe")  # slow to trace, or much like another one
#: Not through transformers' experts interface: stacks that code indexes, or one product over them all.
OUTSIDE = (
    "dbrx",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "step3p7",
)
REFUSED = ("doge",)
CALLED = ("nllb_moe", "switch_transformers", "vitpose_backbone")  # their own code calls a module per expert


def _have(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name in available_families()]


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.long] * (f in LONG)) for f in _have(DOZEN)])
def test_exact(family: str) -> None:
    cases = QUICK if family in ("qwen3_moe", "gpt_oss") else QUICK[::2]
    row = check_family(family, cases, new_tokens=16)
    assert (row.status, row.difference) == ("exact", 0.0), row.reason


@pytest.mark.parametrize("family", _have(("zaya",)))
def test_the_one_pair_of_a_token_is_computed_alone_as_plain_transformers_does(family: str) -> None:
    """A batched matmul of one takes another kernel than that of several."""
    row = check_family(family, [Case("batched_mm", "float32")], prompt=5, new_tokens=4)
    assert (row.status, row.difference, row.top_k) == ("exact", 0.0, 1), row.reason


@pytest.mark.parametrize("family", _have(OUTSIDE))
def test_exact_outside_of_the_interface(family: str) -> None:
    """Experts implementations and ways to wait mean nothing there: two dtypes, batches and budgets do."""
    row = check_family(family, QUICK[::2], new_tokens=16)
    assert (row.status, row.difference) == ("exact", 0.0), row.reason


@pytest.mark.parametrize("family", _have(CALLED))
def test_exact_where_experts_are_called(family: str) -> None:
    row = check_family(family, new_tokens=8)
    assert (row.status, row.difference) == ("exact", 0.0) and row.cases > 1, row.reason


@pytest.mark.parametrize("family", _have(REFUSED))
def test_refused_with_a_reason_that_names_a_module(family: str) -> None:
    model = build(family)
    modules = [name for name, _ in model.named_modules() if name]
    with pytest.raises(moe_offload.UnsupportedModelError) as error:
        moe_offload.optimize(model, "1GB")
    assert any(name in str(error.value) for name in modules), error.value
    assert not hasattr(model, "moe_offload")


def test_every_family_has_experts_that_are_found_or_is_listed_as_refused() -> None:
    def refuses(family: str) -> bool:
        try:
            return not find_experts(build(family))
        except moe_offload.UnsupportedModelError:
            return True

    assert sorted(f for f in available_families() if refuses(f)) == sorted(_have(REFUSED))


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.long)])
def test_no_more_graphs_and_breaks_than_the_unmodified_model(family: str) -> None:
    """Two prompts of different lengths: no break, and no recompilation that plain transformers avoids."""

    def graphs(run) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        run()
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def resident() -> None:
        model = _resident(family, "grouped_mm", "float32", "graph")
        model.compile(backend="eager", dynamic=True)
        for prompt in (16, 11):
            run_session(model, FAMILIES[family].kind, prompt=prompt, new_tokens=12)

    def offloaded() -> None:
        model = moe_offload.optimize(build(family), "1GB", device_map="cpu")
        for prompt in (16, 11):
            run_session(model, FAMILIES[family].kind, prompt=prompt, new_tokens=12)
        model.moe_offload.close()

    want, got = graphs(resident), graphs(offloaded)
    assert got[0] <= want[0] and got[1] == want[1] == 0


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", _have(DOZEN))
def test_exact_through_inductor(family: str) -> None:
    row = check_family(family, SLICE, compile="inductor")
    assert row.status == "exact", row.reason


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", [f for f in available_families() if f not in REFUSED])
def test_every_family(family: str) -> None:
    row = check_family(family, SLICE)
    assert (row.status, row.difference) == ("exact", 0.0), row.reason


def test_a_wrong_expert_would_be_seen(monkeypatch) -> None:
    """The comparison itself can fail: let the cache hand out its neighbour's slot."""
    from moe_offload.runtime.layer import LayerRuntime

    right = LayerRuntime.stream

    def neighbour(self, x_P, ids_P, core, others=()):
        def misled(x, slots, bank_SN, *rest):
            return core(x, (slots + 1) % len(bank_SN), bank_SN, *rest)

        return right(self, x_P, ids_P, misled, others)

    monkeypatch.setattr(LayerRuntime, "stream", neighbour)
    want = run_session(_resident("qwen3_moe", "grouped_mm", "float32", "plain"), "lm", new_tokens=4)
    torch._dynamo.reset()
    options = {"batch": 1, "static_cache": False, "prompt": 16, "new_tokens": 4}
    got = _offloaded("qwen3_moe", Case(residency=1.0), "graph", options)
    assert not all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
