"""How a patched module, and the graphs traced from it, reach the bank of their layer; and how they lose it again."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..runtime.layer import LayerRuntime, closed
from . import backend

_sets = itertools.count()


class Scope:
    """Whether our own backend is running the model. One per model, written under its lock; Dynamo guards on both.

    `banks` names the set of banks that graphs are made for, whose number of slots they hold: no graph of another set
    is ever run again, wherever Dynamo keeps it. (A name, because Dynamo may take a number for a variable.)
    """

    def __init__(self) -> None:
        self.active = False
        self.banks = ""
        self.renew()

    def renew(self) -> None:
        self.banks = f"set {next(_sets)}"


class Link:
    """What an experts module needs to find its layer: the scope, and the bank the marker op is keyed by."""

    def __init__(self, scope: Scope, bank_SN: Tensor):
        self.scope, self.bank_SN = scope, bank_SN


class _Closed:
    """What the bank of a closed model is bound to: whatever a graph asks of it, the answer is `ClosedError`."""

    def __getattr__(self, verb: str) -> Any:
        raise closed("this model")


_CLOSED_BANK = torch.empty(1)
backend.bind(_CLOSED_BANK, _Closed())


def connect(layer: LayerRuntime) -> None:
    """Let the layer's modules and graphs use the bank it has now."""
    backend.bind(layer.slots.bank_SN, layer)
    for module in layer.moe.modules:
        module._moe_offload.bank_SN = layer.slots.bank_SN


def disconnect(layer: LayerRuntime) -> None:
    """Let go of the layer's bank, before its memory is given back."""
    backend.unbind(layer.slots.bank_SN)
    for module in layer.moe.modules:
        module._moe_offload.bank_SN = _CLOSED_BANK
