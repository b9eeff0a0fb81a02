"""The plan's arithmetic, on random layers and costs. Rows may differ in size between layers, and so may E and K."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from moe_offload.config.sizes import format_size
from moe_offload.errors import BudgetError
from moe_offload.plan.budget import HEAP_LIMIT, WORKSPACE_LIMIT, Costs, LayerShape, budget_for, floor_budget, plan_slots


def shapes(row_bytes):
    return st.builds(
        lambda experts, k, row: LayerShape(experts, min(k, experts), row),
        st.integers(1, 16),
        st.integers(1, 4),
        row_bytes,
    )


mixed = st.lists(shapes(st.sampled_from([1, 3, 7, 10, 4096])), min_size=1, max_size=5)
equal_rows = st.sampled_from([1, 7, 4096]).flatmap(lambda row: st.lists(shapes(st.just(row)), min_size=1, max_size=5))
equal_rows_and_k = st.tuples(st.sampled_from([1, 7, 4096]), st.integers(1, 4)).flatmap(
    lambda known: st.lists(
        st.builds(LayerShape, st.integers(known[1], 16), st.just(known[1]), st.just(known[0])), min_size=1, max_size=5
    )
)
alike = st.builds(lambda layer, n: [layer] * n, shapes(st.sampled_from([1, 7, 4096])), st.integers(1, 5))
all_costs = st.builds(
    Costs,
    dense_bytes=st.integers(0, 10**6),
    kv_bytes=st.integers(0, 10**5),
    scores_bytes=st.integers(0, 10**5),
    library_bytes=st.integers(0, 10**5),
    scratch_bytes=st.integers(0, 10**5),
    reserve_bytes=st.none() | st.integers(0, 10**5),
)
#: Bytes above the floor: from nothing to more than all experts.
extra = st.integers(0, 64) | st.integers(0, 10**6)


def spent(plan):
    return plan.bank_bytes + plan.costs.dense_bytes + plan.costs.scratch_bytes + plan.costs.reserve(plan.budget_bytes)


@given(layers=mixed, costs=all_costs, more=extra)
def test_a_plan_is_never_over_budget_and_wastes_no_slot(layers, costs, more):
    budget = floor_budget(layers, costs) + more
    plan = plan_slots(budget, layers, costs)
    assert len(plan.slots) == len(layers)
    assert spent(plan) + plan.unused_bytes == budget and plan.unused_bytes >= 0
    assert sum(size for _, size in plan.rows()) == budget
    for layer, slots in zip(layers, plan.slots, strict=True):
        assert min(layer.least, layer.num_experts) <= slots <= layer.num_experts
        assert slots == layer.num_experts or layer.row_bytes > plan.unused_bytes, "one more slot would have fitted"


@given(layers=equal_rows_and_k, costs=all_costs, more=extra)
def test_slots_are_shared_out_evenly(layers, costs, more):
    """No layer that could take one more is two slots behind another."""
    slots = plan_slots(floor_budget(layers, costs) + more, layers, costs).slots
    growing = [s for layer, s in zip(layers, slots, strict=True) if s < layer.num_experts]
    assert not growing or max(slots) - min(growing) <= 1


@given(layers=equal_rows_and_k, costs=all_costs, more=extra, still_more=extra)
def test_a_larger_budget_takes_no_slot_from_any_layer(layers, costs, more, still_more):
    """Holds where rows have one size and K is the same everywhere, as in nearly every model; E may differ."""
    least = floor_budget(layers, costs)
    small, large = (plan_slots(least + n, layers, costs).slots for n in (more, more + still_more))
    assert all(a <= b for a, b in zip(small, large, strict=True))


@given(layers=equal_rows, costs=all_costs, more=extra, still_more=extra)
def test_a_larger_budget_never_gives_fewer_slots(layers, costs, more, still_more):
    """Holds where rows have one size. Where K differs too, slots may still move from one layer to another."""
    least = floor_budget(layers, costs)
    small, large = (sum(plan_slots(least + n, layers, costs).slots) for n in (more, more + still_more))
    assert small <= large


@given(layers=mixed, costs=all_costs, more=extra, still_more=extra)
def test_a_larger_budget_never_lowers_the_smallest_share(layers, costs, more, still_more):
    """Holds for any mix of rows: the least that a layer not yet full has."""
    least = floor_budget(layers, costs)

    def smallest(n):
        slots = plan_slots(least + n, layers, costs).slots
        full = max(layer.num_experts for layer in layers)
        return min((s for layer, s in zip(layers, slots, strict=True) if s < layer.num_experts), default=full)

    assert smallest(more) <= smallest(more + still_more)


def test_a_larger_budget_takes_no_slot_from_any_layer_where_k_differs():
    layers, costs = [LayerShape(3, 2, 7), LayerShape(2, 1, 7), LayerShape(2, 1, 7)], Costs(0, reserve_bytes=0)
    small, large = (plan_slots(floor_budget(layers, costs) + n, layers, costs).slots for n in (7, 14))
    assert all(a <= b for a, b in zip(small, large, strict=True)), (small, large)


# The floor.


@given(layers=mixed, costs=all_costs, below=st.integers(1, 100))
def test_a_plan_exists_from_the_floor_on(layers, costs, below):
    least = floor_budget(layers, costs)
    plan = plan_slots(least, layers, costs)
    assert all(slots >= min(layer.least, layer.num_experts) for layer, slots in zip(layers, plan.slots, strict=True))
    assume(least > below)
    with pytest.raises(BudgetError):
        plan_slots(least - below, layers, costs)


@given(layers=mixed, costs=all_costs)
def test_the_floor_is_the_smallest_budget_that_holds_k_slots_a_layer(layers, costs):
    least = floor_budget(layers, costs)
    need = sum(layer.least * layer.row_bytes for layer in layers)
    assert costs.for_banks(least) >= need
    assert costs.for_banks(least - 1) < need


def test_the_floor_is_exact_with_a_reserve_that_is_a_share():
    layers, costs = [LayerShape(8, 1, 70)], Costs(dense_bytes=0)
    assert costs.for_banks(floor_budget(layers, costs) - 1) < 70


@example(costs=Costs(10**9, kv_bytes=10**6, scratch_bytes=10**5), layers=[LayerShape(64, 4, 10**7)] * 5)
@given(layers=mixed, costs=all_costs)
def test_below_the_floor_the_error_states_the_floor_and_its_parts(layers, costs):
    least = floor_budget(layers, costs)
    assume(least > 1)
    with pytest.raises(BudgetError) as caught:
        plan_slots(least - 1, layers, costs)
    rows = sum(layer.least for layer in layers)
    experts = sum(layer.least * layer.row_bytes for layer in layers)
    for part in (
        f"budget {format_size(least - 1)} is below the floor",
        f"floor of {format_size(least)}",
        f"dense weights {format_size(costs.dense_bytes)}",
        f"workspace {format_size(costs.reserve(least))}",
        f"scratch for prefill {format_size(costs.scratch_bytes)}",
        f"experts in use at once {format_size(experts)} ({rows} rows in {len(layers)} layers)",
        f"at least {least} bytes",
    ):
        assert part in str(caught.value)


def test_the_automatic_workspace_is_bounded():
    costs = Costs(dense_bytes=0)
    assert costs.reserve(600) == 100
    assert costs.reserve(4 * 10**9) == WORKSPACE_LIMIT
    assert costs.reserve(10**12) == WORKSPACE_LIMIT + HEAP_LIMIT


def test_the_heap_is_kept_for_the_next_layer_where_there_is_room_for_it():
    kept = [budget for budget in range(10**9, 10**10, 10**8) if Costs(0, kv_bytes=10**9).heap_bytes(budget)]
    assert kept[0] == 48 * 10**8 and Costs(0, reserve_bytes=5 * 10**8).heap_bytes(10**9) == HEAP_LIMIT
    assert not Costs(0, kv_bytes=1, reserve_bytes=5 * 10**8).heap_bytes(10**12)


# budget_for.


@given(layers=alike, costs=all_costs, residency=st.floats(0, 1))
def test_budget_for_gives_the_residency_to_the_nearest_slot(layers, costs, residency):
    budget = budget_for(residency, layers, costs)
    experts, k = layers[0].num_experts, layers[0].least
    assert all(slots >= max(k, math.ceil(residency * experts)) for slots in plan_slots(budget, layers, costs).slots)
    assert budget >= floor_budget(layers, costs)


@given(layers=alike, costs=all_costs, residency=st.floats(0, 1))
def test_budget_for_is_minimal(layers, costs, residency):
    budget = budget_for(residency, layers, costs)
    need = sum(max(layer.least, math.ceil(residency * layer.num_experts)) * layer.row_bytes for layer in layers)
    assert costs.for_banks(budget - 1) < need


@given(layers=mixed, costs=all_costs)
def test_budget_for_everything_and_for_nothing(layers, costs):
    assert budget_for(0.0, layers, costs) == floor_budget(layers, costs)
    plan = plan_slots(budget_for(1.0, layers, costs), layers, costs)
    assert plan.slots == tuple(layer.num_experts for layer in layers) and plan.residency == 1.0


@settings(max_examples=30)
@given(layers=mixed, costs=all_costs, a=st.floats(0, 1), b=st.floats(0, 1))
def test_more_residency_never_costs_less(layers, costs, a, b):
    assert budget_for(min(a, b), layers, costs) <= budget_for(max(a, b), layers, costs)


def test_budget_for_keeps_the_share_of_every_layer_where_e_differs():
    layers, costs = [LayerShape(8, 2, 100), LayerShape(64, 2, 100)], Costs(0, reserve_bytes=0)
    slots = plan_slots(budget_for(0.5, layers, costs), layers, costs).slots
    assert all(s >= layer.num_experts / 2 for s, layer in zip(slots, layers, strict=True)), slots


def test_budget_for_gives_at_least_the_residency():
    layers, costs = [LayerShape(10, 1, 100)], Costs(0, reserve_bytes=0)
    assert plan_slots(budget_for(0.25, layers, costs), layers, costs).residency >= 0.25


def test_a_plan_prints_what_it_spends():
    layers = [LayerShape(8, 2, 10**6)] * 3
    plan = plan_slots(40 * 10**6, layers, Costs(10**7, kv_bytes=10**6, scratch_bytes=10**6))
    text = str(plan)
    assert "budget 40.00 MB" in text and f"floor {format_size(plan.floor_bytes)}" in text
    assert "3 MoE layers" in text and "of 8 experts resident" in text and "row 1.00 MB" in text
    for name, size in plan.rows():
        assert name in text and format_size(size) in text
