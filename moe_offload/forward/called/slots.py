"""The weights of the experts in one layer's slots, as parameters; and whether anything has kept or changed them."""

from __future__ import annotations

import threading
import weakref
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...experts import Begins
from ...memory.buffers import NOTHING, Rows, page_aligned
from ...runtime.layer import LayerRuntime

_thread = threading.local()  # `last`: whose copies, of one expert, a thread has made last. There need be no others
Views = tuple[nn.Parameter, ...]  # the fields of one slot, in the order of the layout


class SlotWeights:
    """The fields of whatever expert is in a slot: views of it, which cost no memory. Those of an expert that plain
    transformers has elsewhere (`MoELayer.elsewhere`) are copies, made for each use, that begin where it has them."""

    def __init__(self, layer: LayerRuntime):
        if layer.calls is None:
            raise AssertionError(f"{layer.moe.name}: its experts are not called")
        self.moe, self.calls, self._layer, self._seen = layer.moe, layer.calls, layer, NOTHING
        # Where a device multiplies, nothing depends on where a matrix begins.
        self._elsewhere = layer.moe.elsewhere if layer.device.type == "cpu" else {}
        self._views: list[Views] = []
        self._named: list[dict[str, nn.Parameter]] = []  # the same by name
        self._storage = 0
        self._versioned: Tensor | None = None  # the memory of the slots, where it counts writes
        self._before = 0, 0, 0
        self._copies: dict[str, nn.Parameter] = {}  # of the expert that was asked for last of those elsewhere
        self._phantoms: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        layer.calls.on_failure = self.give_up

    def of(self, slot: int, expert: int) -> dict[str, nn.Parameter]:
        """The fields of a slot, which holds `expert`, by name."""
        self.views(slot, expert)
        return self._copies if expert in self._elsewhere else self._named[slot]

    def views(self, slot: int, expert: int) -> Views:
        """The fields of a slot, which holds `expert`, in the order of the layout."""
        rows = self._layer.slots
        if rows is not self._seen:  # slots have become others
            self._make(rows)
        if expert in self._elsewhere:
            return self._copy(rows.bytes[slot], self._elsewhere[expert])
        return self._views[slot]

    def keep_phantom(self, parameters: dict[str, Any], name: str, phantom: nn.Parameter) -> None:
        """It belongs in a module's `parameters` wherever its expert is not in use."""
        parameters[name] = phantom
        self._phantoms.append((parameters, name, phantom))

    def give_up(self) -> None:
        """A call of the model has failed, anywhere: Ctrl-C may have come before an expert had its phantoms back.

        Frames of a traceback may hold views for as long as they like. The layer then gets other slots, all empty: what
        was seen of these would be taken for the doing of an expert that is called later. Weights that were written to
        stay as they are, and are refused by whoever is called next.
        """
        for parameters, name, phantom in self._phantoms:
            parameters[name] = phantom
        if self._seen is not self._layer.slots or self._seen is NOTHING:
            return
        references, uses, writes = self._before
        held = any(sum(map(getrefcount, views)) != references for views in self._views)
        if self._writes() == writes and (held or torch._C._storage_Use_Count(self._storage) != uses):
            slots = len(self._views)
            self.forget()
            self._layer.cache.resize(slots)  # first: should Ctrl-C come again, no expert is taken to be in them
            self._layer.empty()
            self._layer.hold(slots)

    def forget(self) -> None:
        """Let go of the slots' memory."""
        self._seen, self._views, self._named, self._storage, self._versioned = NOTHING, [], [], 0, None
        self._copies = {}

    def are_untouched(self, views: Views) -> bool:
        """Whether nobody else holds `views` of a slot, or a view of any slot, and nobody but who loads has written.

        Two holders of one parameter are two references in Python, and of a view of it two of its storage.
        """
        references, uses, writes = self._before  # `_state`, without its calls: each expert pays for this
        return (
            sum(map(getrefcount, views)) == references
            and torch._C._storage_Use_Count(self._storage) == uses
            and (self._versioned is None or self._versioned._version == writes)
            and not (self._copies and self._written(views))
        )

    def refuse_changes(self, views: Views) -> None:
        """Raise where a slot is not as it was before an expert was called."""
        if self.are_untouched(views):
            return
        if self._writes() != self._before[2] or self._written(views):
            raise UnsupportedModelError(
                f"{self.moe.name}: an expert changes its own weights while it is called, which would be lost with its "
                "slot; such experts cannot be offloaded"
            )
        raise UnsupportedModelError(
            f"{self.moe.name}: something has kept a view of an expert's weights beyond its call (the expert itself, or "
            "a hook in it), and the slot will hold another expert's next; keep a copy (.clone()) instead"
        )

    def release(self, output: Any) -> Any:
        """An expert's `output`, with a copy of whatever in it is a view of the slot."""
        begin = self._seen.bytes.data_ptr()
        return _map(output, lambda x: x.clone() if begin <= x.data_ptr() < begin + self._seen.bytes.nbytes else x)

    def _copy(self, row: Tensor, begins: Begins) -> Views:
        layout = self.moe.layout.beginning(begins)
        with torch.inference_mode(False):
            copy = page_aligned(layout.row_bytes)
            for field, own in zip(self.moe.layout.fields, layout.fields, strict=True):
                own.view_in(copy.data).copy_(field.view_in(row))
            views = tuple(nn.Parameter(field.view_in(copy), requires_grad=False) for field in layout.fields)
        last = getattr(_thread, "last", lambda: None)()
        if last is not None:
            last._copies = {}  # of whatever layer and model: one expert is called at a time
        self._copies, _thread.last = (
            dict(zip((one.name for one in layout.fields), views, strict=True)),
            weakref.ref(self),
        )
        return views

    def _make(self, rows: Rows) -> None:
        fields = self.moe.layout.fields
        with torch.inference_mode(False):
            views = [
                tuple(nn.Parameter(field.view_in(row), requires_grad=False) for field in fields) for row in rows.bytes
            ]
            # Made in inference mode, a tensor counts no versions; below a device, threads write when they come to it.
            counts = rows.bytes.device.type == "cpu" and not rows.bytes.is_inference()
            self._versioned = rows.bytes if counts else None
        names = [field.name for field in fields]
        self._named = [dict(zip(names, each, strict=True)) for each in views]
        self._views, self._storage = views, rows.bytes.untyped_storage()._cdata
        self._before = self._state(views[0] if views else ())
        self._seen = rows  # last: Ctrl-C before it, and they are made again

    def _state(self, views: Views) -> tuple[int, int, int]:
        """References to the parameters, to their storage, and writes to it that were no loads."""
        return sum(map(getrefcount, views)), torch._C._storage_Use_Count(self._storage), self._writes()

    def _written(self, views: Views) -> bool:
        """Whether `views` are copies, and have been written to."""
        return any(view is copy and view._version > 0 for view, copy in zip(views, self._copies.values(), strict=False))

    def _writes(self) -> int:
        return 0 if self._versioned is None else self._versioned._version


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an expert's inputs or output."""
    found: list[Tensor] = []
    _map(value, found.append)
    return found


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _map(value[key], change)
        return value
    if type(value) in (tuple, list):
        return type(value)(_map(one, change) for one in value)
    return value
