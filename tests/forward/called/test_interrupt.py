"""Ctrl-C while experts are called one by one: the next call says what it always says, whoever holds a traceback."""

from __future__ import annotations

import sys

import pytest
import torch

import moe_offload
from moe_offload.errors import UnsupportedModelError
from tests.fakes import loop_models, stack_models
from tests.fakes.loop_models import offload, prompt, same, session

OURS = (moe_offload.__path__[0], loop_models.__file__.rpartition("/")[0])
BUILD = {"hits": loop_models.build, "stacked": stack_models.build, "lists": stack_models.build}


class Interrupt:
    """KeyboardInterrupt at the `at`th place, counted from 1, where Python may raise it in our code or the model's."""

    def __init__(self, at=0):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, arg):
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(OURS):
            self.seen += 1
            if self.seen == self.at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


@pytest.mark.parametrize("loop", BUILD)
@pytest.mark.parametrize("every", [pytest.param(3, marks=pytest.mark.long), 211])
def test_whatever_is_interrupted_the_next_call_says_what_it_always_says(loop, every):
    """One model for all of them, and the last traceback is always kept."""
    ids = prompt(1, 5)
    want, model = session(BUILD[loop](loop), ids, 1), offload(BUILD[loop](loop), 0.5)
    with Interrupt() as places:
        session(model, ids, 1)
    assert places.seen > 1000
    interrupted, kept = 0, None
    for at in range(1, places.seen, every):
        try:
            with Interrupt(at):
                session(model, ids, 1)
        except KeyboardInterrupt as error:
            interrupted, kept = interrupted + 1, error
        assert same(want, session(model, ids, 1)), at
    assert kept is not None and interrupted > 300 // every


class TestAnExpertThatFails:
    def model(self, fail):
        model = offload(loop_models.build(), 0.5)
        expert = model.model.layers[0].mlp.experts[0]
        return model, expert, expert.w2.register_forward_pre_hook(fail)

    def test_a_traceback_that_holds_a_weight_is_nobody_that_keeps_it(self):
        def fail(module, _):
            weight = module.weight
            raise KeyboardInterrupt(len(weight))

        model, expert, hook = self.model(fail)
        kept = []
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt) as error:
                expert(torch.ones(1, 32))
            kept.append(error)
        hook.remove()
        want = session(loop_models.build(), prompt())
        assert same(want, session(model, prompt()))
        kept.clear()
        assert same(want, session(model, prompt()))

    def test_one_that_has_written_to_its_weights_before_is_refused_from_then_on(self):
        def fail(module, _):
            module.weight.mul_(2)
            raise KeyboardInterrupt

        model, expert, hook = self.model(fail)
        with pytest.raises(KeyboardInterrupt):
            expert(torch.ones(1, 32))
        hook.remove()
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match="changes its own weights"):
                session(model, prompt())


def test_phantoms_are_back_though_ctrl_c_came_before_an_expert_had_them_back():
    """A weight that is read outside of a call would be that of whoever is in the slot by then."""
    model = offload(loop_models.build(), 0.5)
    experts = model.model.layers[0].mlp.experts
    phantom = experts[0].w1.weight
    experts[0](torch.ones(1, 32))

    def cut(*_):
        experts[0].w1._parameters["weight"] = experts._moe_offload.views(0, 0)[0]
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.gate.register_forward_pre_hook(cut)
    with pytest.raises(KeyboardInterrupt):
        model(prompt())
    hook.remove()
    assert experts[0].w1.weight is phantom
    assert same(session(loop_models.build(), prompt()), session(model, prompt()))
