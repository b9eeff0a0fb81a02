"""What a step's code finds on its way to the graph: constants where nothing on the way can have changed."""

from __future__ import annotations

import dis

import pytest
import torch

from moe_offload.forward.steady.arguments import with_known_arguments

CALLS = []


class Has:
    def __init__(self, **values):
        vars(self).update(values)


def __compiled_fn_1(*given):
    CALLS.append(given)
    return [*given]


def made(model):
    """Code of the form that Dynamo makes, which reads from a model, arguments and settings."""

    def run(*args, **kwargs):
        parts = model.parts
        first, weight = parts["first"], parts["second"].values["weight"]
        out = __compiled_fn_1(args[0], first.values["weight"], kwargs["cache"].keys, weight)
        del first
        for i, one in enumerate(out):
            out[i] = [one, weight]
        return out

    return run


@pytest.fixture
def model():
    CALLS.clear()
    return Has(
        parts={"first": Has(values={"weight": torch.empty(0)}), "second": Has(values={"weight": torch.empty(0)})}
    )


def all_of(model):
    return [model.parts, *model.parts.values(), *(one.values for one in model.parts.values())]


def known(model, steady):
    CALLS.clear()
    given = (3,), {"cache": Has(keys=torch.empty(0))}
    run = made(model)
    known = with_known_arguments(run, *given, "__compiled_fn", steady)
    assert not CALLS, "nothing is computed"
    assert known(*given[0], **given[1]) == run(*given[0], **given[1]) and CALLS[0] == CALLS[1]
    return run, known


def names_read(function):
    return [one.argval for one in dis.get_instructions(function) if one.opname == "LOAD_ATTR"]


def test_what_is_steady_is_a_constant(model):
    run, found = known(model, all_of(model))
    assert "parts" in names_read(run) and "keys" in names_read(found)
    assert "values" not in names_read(found)
    assert {id(one.values["weight"]) for one in model.parts.values()} <= set(map(id, found.__code__.co_consts))


def test_what_is_not_steady_is_looked_up(model):
    first = model.parts["first"]
    steady = [one for one in all_of(model) if one is not first.values]
    _, found = known(model, steady)
    assert id(first.values["weight"]) not in set(map(id, found.__code__.co_consts))
    first.values["weight"] = other = torch.empty(0)
    found(3, cache=Has(keys=4))
    assert CALLS[-1][1] is other
    model.parts = {"first": Has(values={"weight": 1}), "second": Has(values={"weight": 2})}
    _, found = known(model, [])
    model.parts["second"].values["weight"] = 5
    found(3, cache=Has(keys=4))
    assert CALLS[-1][3] == 5


def test_code_that_cannot_be_followed_is_left_as_it_is(model):
    def hands_on_a_dictionary(*args, **kwargs):
        return __compiled_fn_1(model.parts)

    def calls_no_graph(*args, **kwargs):
        return model.parts["first"]

    for run in (hands_on_a_dictionary, calls_no_graph):
        assert with_known_arguments(run, (), {}, "__compiled_fn", all_of(model)) is run
