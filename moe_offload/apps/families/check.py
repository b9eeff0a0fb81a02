"""Run a family resident and offloaded, and say whether every output is equal, bit for bit.

The reference is the unmodified model with the same experts implementation: as it is, or through Inductor where the
offloaded one goes through it. A model that `optimize` refuses is reported with its reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...api import optimize
from ...config.settings import OffloadConfig
from ...errors import UnsupportedModelError
from ...experts import find_experts, is_experts
from ...plan.budget import budget_for
from ...plan.weights import layer_shapes, sum_costs
from .session import NotSupported, greedy_tokens, run_session
from .table import FAMILIES
from .tiny import build

#: Under Inductor a fused kernel may round otherwise than the unmodified graph's: the largest difference accepted.
INDUCTOR_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One way to run a family."""

    implementation: str = "grouped_mm"
    dtype: str = "float32"
    batch: int = 1
    static_cache: bool = False
    residency: float = 0.0  # share of experts that have a slot; 0 is the floor
    overlap: bool | None = None  # whether decode computes while it loads; None: as it comes

    def __str__(self) -> str:
        cache = "static" if self.static_cache else "dynamic"
        waits = ", waiting for all" if self.overlap is False else ""
        where = f"{self.residency:.0%} resident{waits}"
        return f"{self.implementation} {self.dtype} batch {self.batch} {cache} cache, {where}"


#: Both implementations, dtypes, batches, caches and ways to decode, at the floor and above: what the command runs.
QUICK = (
    Case("grouped_mm", "float32", 1, False, 0.0),
    Case("grouped_mm", "float32", 1, False, 0.0, overlap=False),
    Case("batched_mm", "bfloat16", 3, True, 0.5),
)
MATRIX = tuple(
    itertools.starmap(
        Case,
        itertools.product(
            ("grouped_mm", "batched_mm"),
            ("float32", "bfloat16"),
            (1, 3),
            (False, True),
            (0.0, 0.25, 0.5, 1.0),
            (False, True),
        ),
    )
)


@dataclass(frozen=True)
class FamilyResult:
    """The outcome for one family. `difference` is the largest between any two outputs, 0.0 if all are equal."""

    family: str
    status: str  # exact | refused | different
    reason: str
    model: str
    moe_layers: int = 0
    experts: int = 0
    top_k: int = 0
    cases: int = 0
    difference: float = 0.0

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def check_family(
    family: str,
    cases: Iterable[Case] = QUICK,
    *,
    compile: str = "graph",
    prompt: int = 16,
    new_tokens: int = 32,
) -> FamilyResult:
    """Run `family` in every case. Cases that the family itself cannot run (no static cache) are passed over."""
    model = build(family)
    name = type(model).__name__
    try:
        moe_layers = find_experts(model)
    except UnsupportedModelError as error:
        return FamilyResult(family, "refused", str(error), name)
    facts = {"moe_layers": len(moe_layers), "experts": moe_layers[0].num_experts, "top_k": moe_layers[0].top_k}
    done, worst = 0, 0.0
    for key, group in itertools.groupby(sorted(cases, key=_reference_key), key=_reference_key):
        implementation, dtype, batch, static = key
        torch._dynamo.reset()
        reference = _resident(family, implementation, dtype, compile)
        options: dict[str, Any] = {"batch": batch, "static_cache": static, "prompt": prompt, "new_tokens": new_tokens}
        try:
            want = run_session(reference, FAMILIES[family].kind, **options)
        except NotSupported:
            continue
        for case in group:
            torch._dynamo.reset()
            got = _offloaded(family, case, compile, options)
            difference = _difference(want, got)
            worst = max(worst, difference)
            bound = INDUCTOR_TOLERANCE if compile == "inductor" and dtype == "float32" else 0.0
            same_tokens = torch.equal(greedy_tokens(want), greedy_tokens(got))
            if not same_tokens or (difference > bound and not (compile == "inductor" and dtype != "float32")):
                return FamilyResult(
                    family, "different", f"{case}: outputs differ by {difference:.3g}", name, **facts, cases=done
                )
            done += 1
    return FamilyResult(family, "exact", "", name, **facts, cases=done, difference=worst)


def _reference_key(case: Case) -> tuple[str, str, int, bool]:
    return case.implementation, case.dtype, case.batch, case.static_cache


def _resident(family: str, implementation: str, dtype: str, compile: str) -> Any:
    model = build(family, dtype=getattr(torch, dtype))
    module: Any
    for module in model.modules():
        if is_experts(module):
            module.config._experts_implementation_internal = implementation
    if compile == "inductor":
        model.compile(backend="inductor", dynamic=OffloadConfig().dynamic)
    return model


def _offloaded(family: str, case: Case, compile: str, options: dict[str, Any]) -> list[Tensor]:
    model: Any = build(family, dtype=getattr(torch, case.dtype))
    settings = OffloadConfig(
        experts_implementation=case.implementation,
        compile=compile,
        overlap=case.overlap,
        poison=True,
        profile="off",
        kv_tokens=64,
        wave_rows=1,
    )
    moe_layers = find_experts(model)
    budget = budget_for(case.residency, layer_shapes(moe_layers), sum_costs(model, moe_layers, settings))
    optimize(model, budget, device_map="cpu", config=settings)
    try:
        return run_session(model, FAMILIES[family].kind, **options)
    finally:
        model.moe_offload.close()


def _difference(want: list[Tensor], got: list[Tensor]) -> float:
    """The largest absolute difference; infinite where one is NaN and the other is not."""
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if not torch.equal(a, b):
            gap = float((a - b).abs().max())
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst
