"""Who computes when, of several `generate` calls of one model. All of it happens in the thread that calls `run`.

    step begins     new ones join; each runs its Python, its attention ... up to the experts of layer 0
    layer 0         what all of them ask for is looked up once, and begins to load; each computes alone, and goes on
    layer 1 ...     the same, until each has its logits, has sampled, and is about to begin the next step

A forward of several tokens, which is a prompt or a piece of one, runs from its beginning to its end before those of one
token. A model whose experts are called one by one, or which is compiled whole, takes turns from step to step only; so
does any while its trace is recorded, in which a forward is that of one request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent
from torch import Tensor

from ...errors import OffloadError, ServeError
from .member import Member
from .turn import Turn

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
        try:
            while self._admit(take):
                self._take_step(self._of_one_workload())
        finally:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(OffloadError):
                    stack.enter_context(self._scope.alone())
                for member in list(self._members.values()):
                    member.end()
            self._members.clear()
            self._scope.meeting = None

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

    def before_experts(self, module: Any, ids_TK: Tensor) -> None:
        if len(self._members) < 2 or self._runtime.recorder is not None:
            return
        member = self._members.get(getcurrent())
        if member is not None and member.tokens == len(ids_TK) == 1:
            member.layer, member.ids = self._layers[id(module)], ids_TK.reshape(-1).tolist()
            member.greenlet.parent.switch()

    # One step of each.

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
                while waiting := [member for member in members if member.layer is not None]:
                    self._ask_together(waiting)
        for member in members:
            if member.ended:
                del self._members[member.greenlet]
                if member.error is not None and not isinstance(member.error, Exception):
                    raise member.error
                member.turn.done(member.error)

    def _ask_together(self, waiting: list[Member]) -> None:
        """Those that have come to the first layer of all that are waited at compute it, and go on."""
        layer = min((one.layer for one in waiting if one.layer is not None), key=lambda one: one.moe.index)
        here = [member for member in waiting if member.layer is layer]
        while here:
            order = layer.joint.begin([member.ids for member in here])
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
