"""The forms "stacks" and "lists": the model's code reads one expert's weight at a time, by a number.

    self.gate_up_proj        a `Stack`, which gives an `ExpertRow` for each number; the entries of a list are rows
    linear(x, row)           `Reads.take`: the row becomes resident, and the product is computed with its slot

The loop around them is not touched, nor known.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...experts import MoELayer
from ...runtime.layer import LayerRuntime
from ..binding import Scope
from .row import ExpertRow, Source
from .slots import SlotWeights
from .stack import Stack


class Reads:
    """What the rows of one layer ask when they are used."""

    def __init__(self, layer: LayerRuntime, scope: Scope):
        if layer.calls is None:
            raise AssertionError(f"{layer.moe.name}: its experts are not read one by one")
        self.name, self.num_experts = layer.moe.name, layer.moe.num_experts
        self.weights, self._calls, self._scope = SlotWeights(layer), layer.calls, scope
        self._seen: set[tuple[int, str]] = set()  # what has been read in the event that is going on

    def entered(self) -> AbstractContextManager[object]:
        """While it is entered, no other thread runs the model: what was taken stays where it is."""
        if self._scope.is_entered:
            return nullcontext()
        self._scope.wait_for_turn(self.name)
        return self._scope.entered()

    def take(self, expert: int, field: str, tokens: int) -> dict[str, nn.Parameter]:
        """The weights of `expert` by field, views of its slot, until the next one is taken."""
        calls = self._calls
        if not calls.used:
            self._seen.clear()
        if expert in calls.used and (expert, field) not in self._seen:  # another of the weights it was asked for
            slot = calls.again(expert)
        else:
            slot = calls.begin(expert, tokens)
            calls.end()
            if len(calls.used) == 1:
                self._seen.clear()
        self._seen.add((expert, field))
        return self.weights.of(slot, expert)


def serve_rows(layer: LayerRuntime, scope: Scope) -> SlotWeights:
    """Put stacks and rows in place of the weights of `layer`. Returns what holds views of its slots."""
    reads = Reads(layer, scope)
    put_rows(layer.moe, reads, layer.device)
    return reads.weights


def put_rows(moe: MoELayer, source: Source, device: torch.device) -> None:
    """Put stacks and rows that ask `source` in place of the weights of a layer."""
    fields = {field.name: field for field in moe.unpacked.fields}
    # Never written to, so the system gives no memory for it.
    empty = {name: torch.empty(field.shape, dtype=field.dtype, device=device) for name, field in fields.items()}
    for place in (place for places in moe.places for place in places):
        row = empty[place.field]
        if place.expert is None:
            stand_in: Tensor = Stack.of(source, fields[place.field], place.tensor, row)
        else:
            stand_in = ExpertRow.of(row, source, place.field, place.expert)
            stand_in._is_param = True  # what torch asks to tell parameters by
        place.module._parameters[place.attribute] = stand_in


def keep_untraced(moe: MoELayer, model: nn.Module) -> None:
    """Let nobody's torch.compile look into the modules that read rows: a stack is no tensor that Dynamo can follow.

    Who reads is the module that holds them, or the one around it.
    """
    for name, module in zip(moe.names, moe.modules, strict=True):
        for reader in (module, model.get_submodule(name.rpartition(".")[0])):
            if reader is not model and "forward" not in vars(reader):
                reader.__dict__["forward"] = _untraced(reader.forward)


def _untraced(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    disabled: Any = torch._disable_dynamo(run)  # type: ignore[attr-defined]  # lazy, as in passes/ops.py

    def call(*args: Any, **kwargs: Any) -> Any:
        return (disabled if torch.compiler.is_dynamo_compiling() else forward)(*args, **kwargs)

    return call
