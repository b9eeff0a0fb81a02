"""Quantised checkpoints: rows rest packed, and everything that is computed is plain transformers', bit for bit.

Two formats at two budgets run always; the rest of the matrix is `long`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_offload
from moe_offload.apps.families.quantised.kinds import KINDS
from moe_offload.apps.families.session import run_session
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs
from tests.fakes.offloaded import SETTINGS
from tests.fakes.quantised_checkpoints import write

SESSIONS = ({"batch": 1, "prompt": 17}, {"batch": 3, "prompt": 16})  # at the floor a prompt needs more than the slots
FAST = ("mxfp4", "fp8")
RESIDENCIES = (0.0, 0.25, 0.5, 1.0)


def _marks(kind: str, fast: bool) -> list[Any]:
    needs = KINDS[kind].needs
    absent = bool(needs) and importlib.util.find_spec(needs) is None
    marks = [pytest.mark.skipif(absent, reason=f"needs {needs}")]
    return marks if fast else [*marks, pytest.mark.long]


MATRIX = [
    pytest.param(kind, residency, marks=_marks(kind, kind in FAST and residency in (0, 0.5)))
    for kind in KINDS
    for residency in RESIDENCIES
]
ANY_DTYPE = ("mxfp4", "ct-int4", "ct-fp8", "ct-mxfp4")  # transformers cannot run the others so
EACH = [pytest.param(kind, marks=_marks(kind, kind in FAST)) for kind in KINDS]


class Reference:
    """A checkpoint, and what plain transformers makes of it."""

    def __init__(self, kind: str, folder: Path):
        self.folder = write(kind, folder)
        model = load_plain(self.folder)
        self.sessions = [run(model, **session) for session in SESSIONS]
        self.state = model.state_dict()  # after a forward, in which compressed-tensors unpacks dense weights


def load_plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()


def run(model: Any, **session: Any) -> list[torch.Tensor]:
    """The logits of every step: a prompt, and 12 tokens."""
    return run_session(model, "lm", new_tokens=12, **session)


def load_ours(folder: Path, residency: float = 0.25) -> Any:
    found = outline_folder(folder)
    budget = budget_for(residency, layer_shapes(found.moe_layers), sum_costs(found.model, found.moe_layers, SETTINGS))
    return moe_offload.from_pretrained(folder, budget, config=SETTINGS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    made: dict[str, Reference] = {}

    def get(kind: str) -> Reference:
        if kind not in made:
            made[kind] = Reference(kind, tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return get


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert torch.isfinite(theirs).all() and torch.equal(ours, theirs), f"step {step}"


@pytest.mark.parametrize(("kind", "residency"), MATRIX)
def test_logits_and_tokens_are_those_of_plain_transformers(reference, kind: str, residency: float) -> None:
    want = reference(kind)
    with load_ours(want.folder, residency).moe_offload as handle:
        assert all(moe.packed for moe in handle.moe_layers)
        for session, logits in zip(SESSIONS, want.sessions, strict=True):
            assert_same(run(handle.model, **session), logits)
        if residency < 1:
            assert handle.stats().misses > 0


@pytest.mark.parametrize("kind", EACH)
def test_rows_unpack_to_plain_transformers_parameters(reference, kind: str) -> None:
    """Also through our own formulas, and not transformers' operations: those would be there if the two differed."""
    want = reference(kind)
    with load_ours(want.folder).moe_offload as handle:
        found = handle.model.state_dict()
        assert found.keys() == want.state.keys()
        assert [name for name in found if not torch.equal(found[name], want.state[name])] == []
        assert {type(weight).__name__ for moe in handle.moe_layers for weight in moe.packed} == {"MatrixWeight"}


@pytest.mark.parametrize("kind", EACH)
def test_what_a_miss_reads_is_what_the_plan_says(reference, kind: str) -> None:
    want = reference(kind)
    with load_ours(want.folder).moe_offload as handle:
        run(handle.model, **SESSIONS[0])
        stats = handle.stats()
        assert stats.misses > 0
        assert all(
            layer.row_bytes == shape.row_bytes for layer, shape in zip(stats.layers, handle.plan.layers, strict=True)
        )
        for layer, moe in zip(stats.layers, handle.moe_layers, strict=True):
            fields = sum(field.nbytes for field in moe.layout.fields)
            assert layer.bytes_read == layer.misses * fields and 0 <= moe.layout.row_bytes - fields < 8192
            assert moe.layout.row_bytes < moe.unpacked.row_bytes * 0.6


@pytest.mark.parametrize("kind", EACH)
def test_a_model_that_plain_transformers_loaded_is_optimized(reference, kind: str) -> None:
    want = reference(kind)
    model = moe_offload.optimize(load_plain(want.folder), "2GB", config=SETTINGS)
    with model.moe_offload as handle:
        for session, logits in zip(SESSIONS, want.sessions, strict=True):
            assert_same(run(handle.model, **session), logits)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=_marks(kind, kind == "mxfp4")) for kind in ANY_DTYPE])
def test_another_dtype_is_loaded_as_transformers_loads_it(reference, kind: str) -> None:
    """compressed-tensors unpacks int4 and MXFP4 into bfloat16 whatever was asked for; others are converted."""
    folder = reference(kind).folder
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm")
    wanted = run(plain.eval(), **SESSIONS[0])
    with moe_offload.from_pretrained(folder, "1GB", config=SETTINGS, dtype=torch.float32).moe_offload as handle:
        assert_same(run(handle.model, **SESSIONS[0]), wanted)


@pytest.mark.parametrize("kind", FAST)
def test_packed_products_are_nearer_to_float32_or_as_near(reference, kind: str) -> None:
    """compute="packed": other bits for few rows of an expert, those of plain transformers for many."""
    want, ids = reference(kind), torch.arange(3, 7)[None]
    plain = load_plain(want.folder)
    exact = plain(ids).logits
    with moe_offload.from_pretrained(
        want.folder, "1GB", config=replace(SETTINGS, compute="packed")
    ).moe_offload as handle:
        found = handle.model(ids).logits
        error = (found.float() - exact.float()).norm() / exact.float().norm()
        assert error < 0.02 and (kind == "mxfp4" or not torch.equal(found, exact))  # MXFP4 is no more exact in float32
        assert torch.equal(handle.model(ids).logits, found)  # the same bits again
        weight = handle.moe_layers[0].packed[0]
        row = torch.zeros(handle.moe_layers[0].layout.row_bytes, dtype=torch.uint8)
        few, many = (torch.ones((rows, plain.config.hidden_size), dtype=weight.dtype) for rows in (2, 9))
        transposed = weight.shape[-1] == plain.config.hidden_size
        for x in (few, many):
            out = torch.full((len(x), weight.shape[0 if transposed else 1]), 7.0, dtype=weight.dtype)
            weight.multiply(x, row[None], [(0, 0, len(x))], out, transposed)
            assert not out.any()
