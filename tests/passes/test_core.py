"""A core on some of the pairs: which graph runs, with which pairs, and whose results come back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from passes import Bank, Core
from tests.fakes.traced_block import FakeField

BANK = Bank((FakeField("weight", (1,), torch.float32, 0, 4),), 4, torch.float32)
X_P = torch.arange(5.0).view(5, 1)
BANK_SN = torch.tensor([[10.0], [20.0], [30.0], [40.0]])


class Runs:
    """Stands for both graphs of a core: y = x + weight[slot], and what each call was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[float], list[int]]] = []

    def whole(self, x_P, slots_P, pairs, weight, *others):
        self.calls.append(("whole", x_P.flatten().tolist(), slots_P.tolist()))
        return x_P + weight[slots_P]

    def part(self, x_P, slots_P, pairs, weight, *others):
        self.calls.append(("part", pairs.tolist(), slots_P.tolist()))
        out = torch.full_like(x_P, float("nan"))
        out[pairs] = x_P[pairs] + weight[slots_P[pairs]]
        return out


def as_is(gm):
    return gm.forward


def make_core(grouped: bool, pairs_independent: bool, scalars=()) -> tuple[Core, Runs]:
    empty = Graph()
    empty.output(None)
    gm, runs = GraphModule(torch.nn.Module(), empty), Runs()
    core = Core(gm, gm, grouped, ("weight",), scalars, pairs_independent, BANK, as_is)
    core.run_whole, core.run_part = runs.whole, runs.part
    return core, runs


@pytest.mark.parametrize("pairs", [torch.tensor([3, 1]), torch.tensor([2]), slice(1, 4), slice(2, 3)], ids=str)
@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_result_for_each_pair_of_the_wave_in_its_order(grouped, independent, pairs):
    core, _ = make_core(grouped, independent)
    count = len(X_P[pairs])
    slots_R = torch.tensor([3, 0, 2])[:count]
    assert torch.equal(core(X_P, slots_R, BANK_SN, (), pairs), X_P[pairs] + BANK_SN[slots_R])


def test_a_pair_is_never_multiplied_alone():
    """A batched matmul of one takes another kernel, which rounds otherwise."""
    core, runs = make_core(grouped=False, pairs_independent=True)
    core(X_P, torch.tensor([2]), BANK_SN, (), torch.tensor([4]))
    core(X_P, torch.tensor([2]), BANK_SN, (), slice(4, 5))
    assert runs.calls == [("whole", [4.0, 4.0], [2, 2])] * 2
    core, runs = make_core(grouped=False, pairs_independent=False)
    core(X_P, torch.tensor([2]), BANK_SN, (), torch.tensor([4]))
    assert runs.calls == [("part", [4, 4], [0, 0, 0, 0, 2])]


def test_groups_of_one_pair_are_run_as_they_are():
    core, runs = make_core(grouped=True, pairs_independent=True)
    core(X_P, torch.tensor([2]), BANK_SN, (), slice(4, 5))
    core(X_P, torch.tensor([2]), BANK_SN, (), torch.tensor([4]))
    assert runs.calls == [("whole", [4.0], [2])] * 2, "a group of one: among others, rows are rounded otherwise"


def test_pairs_that_depend_on_others_run_in_their_places():
    core, runs = make_core(grouped=True, pairs_independent=False)
    core(X_P, torch.tensor([3, 1]), BANK_SN, (), slice(1, 3))
    assert runs.calls == [("part", [1, 2], [0, 3, 1, 0, 0])]


def test_a_number_is_handed_over_as_a_number():
    core, _ = make_core(grouped=True, pairs_independent=True, scalars=(1,))
    seen = []
    core.run_whole = lambda x_P, slots_P, pairs, weight, *others: seen.append(others) or x_P
    core(X_P, torch.zeros(5, dtype=torch.int64), BANK_SN, (torch.ones(2), torch.tensor(7.0)))
    ((tensor, number),) = seen
    assert torch.equal(tensor, torch.ones(2)) and number == 7.0 and not isinstance(number, torch.Tensor)


def test_cores_that_take_a_number_and_a_tensor_there_are_not_one():
    """Their code is the same: what is a number is said beside it."""
    (one, _), (other, _) = make_core(True, True), make_core(True, True, scalars=(0,))
    assert one.key != other.key and one.key == make_core(True, True)[0].key


def graph_of(function, *others) -> GraphModule:
    graph = Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), *others)))
    return GraphModule(torch.nn.Module(), graph)


def functions_of_one_name():
    """Two, that the code of a graph calls by the same name."""

    def made():
        def function(x):
            return x

        return function

    return made(), made()


ONE, OTHER = functions_of_one_name()
CHANGES = {
    "another graph": {"part": graph_of(torch.neg)},
    "another number in it": {"part": graph_of(torch.add, 2)},
    "another function of that name": {"part": graph_of(OTHER)},
    "groups": {"grouped": False},
    "weights": {"fields": ("bias",)},
    "numbers": {"scalars": (0,)},
    "pairs that depend on others": {"pairs_independent": False},
    "places in a row": {"bank": Bank((FakeField("weight", (1,), torch.float32, 4, 4),), 4, torch.float32)},
    "type of a bank": {"bank": Bank(BANK.fields, 4, torch.bfloat16)},
    "what compiles it": {"compiler": lambda gm: gm.forward},
    "products of few pairs": {"few_pairs": 4},
}


@pytest.mark.parametrize("name", CHANGES)
def test_layers_share_a_core_only_if_all_that_it_runs_is_the_same(name):
    changes: dict[str, Any] = CHANGES[name]
    core = replace(make_core(True, True)[0], part=graph_of(*((torch.add, 1) if "number" in name else (ONE,))))
    assert replace(core, whole=core.whole).key == core.key != replace(core, **changes).key


@pytest.mark.parametrize(("pairs", "which"), [(4, "few"), (5, "few"), (6, "all")])
def test_up_to_so_many_pairs_are_few(pairs, which):
    core, called = replace(make_core(True, True)[0], few_pairs=5), []
    core.run_whole = core.run_part = lambda x_P, *others: called.append("all") or x_P
    core.run_few = (lambda x_P, *others: called.append("few") or x_P, None)
    core(torch.zeros(pairs, 1), torch.zeros(pairs, dtype=torch.int64), BANK_SN, ())
    assert called == [which]
