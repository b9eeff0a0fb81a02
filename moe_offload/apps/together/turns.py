"""Who computes when, of several `generate` calls of one model. All of it happens in the thread that calls `run`.

    step begins     new ones join; each runs its Python, its attention ... up to the experts of layer 0
    layer 0         what all of them ask for is looked up once, and begins to load; each computes alone, and goes on
    layer 1 ...     the same, until each has its logits, has sampled, and is about to begin the next step

Where a product's rows are known to have the bits that each has alone (`patch/exact_products.py`), the experts and the
large linear layers are computed for all of them at once, and each weight is read once. For every layer and number of
calls the first output is compared with what each gets alone.

A forward of several tokens, which is a prompt or a piece of one, runs from its beginning to its end before those of one
token. A model whose experts are called one by one, or which is compiled whole, takes turns from step to step only; so
does any while its trace is recorded, in which a forward is that of one request.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from ...errors import OffloadError, ServeError
from ...packed.exact import same_bits, switches
from ...patch.exact_products import MEETING, multiply_alone, multiply_rows
from ...runtime.kernels.exact_rows import each_as_alone
from ...runtime.layer import LayerRuntime
from .member import Member
from .turn import Turn

logger = logging.getLogger("moe_offload")

STATEFUL_ROPE = "dynamic"  # the modules that compute it remember the longest sequence of any call


class Turns:
    """Takes turns in one offloaded model.

    Args:
        model: it computes on a CPU, in this process alone.
        most: how many run at once.

    Raises:
        ServeError: this model's calls cannot take turns.
    """

    def __init__(self, model: Any, most: int):
        obstacle = why_not_in_turns(model)
        if obstacle:
            raise ServeError(f"{most} requests cannot be computed together: {obstacle}. Use --parallel 1")
        call = model._compiled_call_impl
        self.most, self._handle, self._scope, self._runtime = most, model.moe_offload, call.scope, call.runtime
        self._layers = {id(module): layer for layer in call.runtime.layers for module in layer.moe.modules}
        self._order = {id(module): i for i, module in enumerate(model.modules())}
        within = {id(part) for layer in call.runtime.layers for own in layer.moe.modules for part in own.modules()}
        self._linears = [one for one in model.modules() if isinstance(one, nn.Linear) and id(one) not in within]
        self._alike: dict[Hashable, bool] = {}  # of a module and a number of calls: whether rows are as alone
        self._members: dict[Any, Member] = {}

    def run(self, take: Callable[[], Turn | None]) -> None:
        """Run what `take` gives, which is asked before each step as long as there is room, until there is nothing left.

        An error of one is told to its `done`, and the others go on. Only what is no `Exception` ends them all.

        Raises:
            OffloadError: Another thread runs some of this model.
        """
        if self._scope.meeting is not None:
            raise OffloadError(
                "calls of this model are computed together already, by another thread or around this one"
            )
        self._scope.meeting = self
        for linear in self._linears:
            vars(linear)[MEETING] = self
        # Gradients are switched off per thread, not per greenlet: outside of all of them, whichever ends first.
        with torch.no_grad():
            try:
                while self._admit(take):
                    self._take_step(self._of_one_workload())
            finally:
                self._end_all()

    # What calls of the model ask (`forward/binding.py`: Meeting).

    def is_inside(self) -> bool:
        return getcurrent() in self._members

    def crowd(self) -> int:
        return max(1, len(self._members))

    def before_forward(self, tokens: int) -> None:
        member = self._members.get(getcurrent())
        if member is not None:
            member.tokens = tokens
            member.greenlet.parent.switch()

    def experts(self, module: Any, given: tuple[Tensor, ...]) -> Tensor | None:
        if len(self._members) < 2 or self._runtime.recorder is not None:
            return None
        return self._wait_at(module, given)

    def multiply(self, linear: Any, x_MI: Tensor) -> Tensor | None:
        return self._wait_at(linear, (x_MI,)) if len(self._members) > 1 else None

    def _wait_at(self, module: Any, given: tuple[Tensor, ...]) -> Tensor | None:
        """Wait for the others that make a step of decoding to come to the same module."""
        member = self._members.get(getcurrent())
        if member is None or not member.tokens == len(given[0]) == 1:
            return None
        member.at, member.given = module, given
        member.greenlet.parent.switch()
        result, member.result, member.given = member.result, None, ()
        return result

    # One step of each.

    def _end_all(self) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OffloadError):
                stack.enter_context(self._scope.alone())
            for member in list(self._members.values()):
                member.end()
        self._members.clear()
        for linear in self._linears:
            vars(linear).pop(MEETING, None)
        self._scope.meeting = None

    def _admit(self, take: Callable[[], Turn | None]) -> bool:
        """Let new ones in; whether there are any at all."""
        while len(self._members) < self.most and (turn := take()) is not None:
            member = Member(turn, getcurrent())
            self._members[member.greenlet] = member
        return bool(self._members)

    def _of_one_workload(self) -> list[Member]:
        """Whose usage is counted for the same; the next time it is the others' turn."""
        members = list(self._members.values())
        workload = members[0].turn.workload
        chosen = [member for member in members if member.turn.workload == workload]
        if len(chosen) < len(members):
            for member in chosen:
                self._members[member.greenlet] = self._members.pop(member.greenlet)
        if workload is not None:
            self._handle.count_for(workload)
        return chosen

    def _take_step(self, members: list[Member]) -> None:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._scope.alone())
            except Exception as error:  # the model was closed
                for member in members:
                    member.end(error)
            else:
                for member in sorted(members, key=lambda one: one.tokens == 1):  # a prompt waits for nobody
                    member.go_on()
                while waiting := [member for member in members if member.at is not None]:
                    first = min((member.at for member in waiting), key=lambda module: self._order[id(module)])
                    self._compute(first, [member for member in waiting if member.at is first])
        for member in members:
            if member.ended:
                del self._members[member.greenlet]
                if member.error is not None and not isinstance(member.error, Exception):
                    raise member.error
                member.turn.done(member.error)

    def _compute(self, module: Any, here: list[Member]) -> None:
        """Let those that have come to a module, which is the first that anybody waits for, go on behind it."""
        layer = self._layers.get(id(module))
        outputs = self._compute_as_one(module, layer, here) if len(here) > 1 else None
        if outputs is not None:
            for member, output in zip(here, outputs, strict=True):
                member.result = output
        if outputs is not None or layer is None:
            for member in here:
                member.go_on()
        else:
            self._ask_together(layer, here)

    def _compute_as_one(self, module: Any, layer: LayerRuntime | None, here: list[Member]) -> list[Tensor] | None:
        """The output of each, from products of all of them; None where each is to be computed alone."""
        run = partial(multiply_rows, module) if layer is None else partial(module._moe_offload.run, module)
        key = id(module), len(here), switches()
        alike = self._alike.get(key)
        if alike is False or (layer is not None and not layer.joint.shares_products(len(here))):
            return None
        try:
            with each_as_alone():
                together = run(*map(torch.cat, zip(*(member.given for member in here), strict=True)))
            if alike is None:
                counters = None if layer is None else vars(layer.cache.counters)
                counted = dict(counters or {})
                by_itself = run if layer is not None else partial(multiply_alone, module)
                alone = torch.cat([by_itself(*member.given) for member in here])
                if counters is not None:  # that nobody has asked for it is not to be seen
                    counters.update(counted)
                self._alike[key] = same_bits(together, alone)
                if not self._alike[key]:
                    logger.warning("%s: several rows have other bits than each alone", type(module).__name__)
                    together = alone
        except Exception as error:  # a row of one of them cannot be read: whose that is, shows when each asks
            logger.debug("%s: %d calls are computed one by one: %s", type(module).__name__, len(here), error)
            return None
        return [row.clone() for row in together.split(1)]  # each begins where new memory does, as it would alone

    def _ask_together(self, layer: LayerRuntime, here: list[Member]) -> None:
        """Each computes the experts of `layer` alone, and goes on; what they ask for is looked up together."""
        while here:
            order = layer.joint.begin([member.given[1].reshape(-1).tolist() for member in here])
            try:
                for i in order:
                    here[i].go_on()
            finally:
                layer.joint.end()
            here = [member for i, member in enumerate(here) if i not in order]


def why_not_in_turns(model: Any) -> str:
    """Why calls of `model` have to be made one after the other; empty where they need not."""
    handle = model.moe_offload
    if handle.ranks is not None:
        return "its experts are shared by several processes, which compute the same request at a time"
    devices = {layer.device.type for layer in model._compiled_call_impl.runtime.layers}
    if devices != {"cpu"}:
        return f"it computes on {', '.join(sorted(devices))}, and only a CPU's calls take turns"
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        if STATEFUL_ROPE in (kinds.values() if isinstance(kinds, dict) else (kinds,)):
            return f"{name} remembers the longest sequence of any call (rope_type {STATEFUL_ROPE!r})"
    return ""
