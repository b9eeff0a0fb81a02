"""The weights of the experts in one layer's slots, as parameters; and whether anything has kept or changed them."""

from __future__ import annotations

from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...memory.buffers import NOTHING, Rows
from ...runtime.layer import LayerRuntime

Views = tuple[nn.Parameter, ...]  # the fields of one slot, in the order of the layout


class SlotWeights:
    """The fields of whatever expert is in a slot: views of it, which cost no memory."""

    def __init__(self, layer: LayerRuntime):
        if layer.calls is None:
            raise AssertionError(f"{layer.moe.name}: its experts are not called")
        self.moe, self.calls, self._arrivals, self._seen = layer.moe, layer.calls, layer.arrivals, NOTHING
        self._views: list[Views] = []
        self._storage = 0
        self._versioned: Tensor | None = None  # the memory of the slots, where it counts writes
        self._before = 0, 0, 0

    def of(self, slot: int) -> dict[str, nn.Parameter]:
        """The fields of a slot by name."""
        names = (field.name for field in self.moe.layout.fields)
        return dict(zip(names, self.views(slot), strict=True))

    def views(self, slot: int) -> Views:
        """The fields of a slot, in the order of the layout."""
        rows = self._arrivals.slots
        if rows is not self._seen:  # slots have become others
            self._make(rows)
        return self._views[slot]

    def forget(self) -> None:
        """Let go of the slots' memory."""
        self._seen, self._views, self._storage, self._versioned = NOTHING, [], 0, None

    def are_untouched(self, views: Views) -> bool:
        """Whether nobody else holds `views` of a slot, or a view of any slot, and nobody but who loads has written.

        Two holders of one parameter are two references in Python, and of a view of it two of its storage.
        """
        return self._state(views) == self._before

    def refuse_changes(self, views: Views) -> None:
        """Raise where a slot is not as it was before an expert was called."""
        if self.are_untouched(views):
            return
        if self._state(views)[2] != self._before[2]:
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

    def _make(self, rows: Rows) -> None:
        fields = self.moe.layout.fields
        with torch.inference_mode(False):
            self._views = [
                tuple(nn.Parameter(field.view_in(row), requires_grad=False) for field in fields) for row in rows.bytes
            ]
            # Made in inference mode, a tensor counts no versions; below a device, threads write when they come to it.
            counts = rows.bytes.device.type == "cpu" and not rows.bytes.is_inference()
            self._versioned = rows.bytes if counts else None
        self._seen, self._storage = rows, rows.bytes.untyped_storage()._cdata
        self._before = self._state(self._views[0] if self._views else ())

    def _state(self, views: Views) -> tuple[int, int, int]:
        """References to the parameters, to their storage, and writes to it that were no loads."""
        writes = 0 if self._versioned is None else self._versioned._version - self.calls.written
        return sum(map(getrefcount, views)), torch._C._storage_Use_Count(self._storage), writes


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
