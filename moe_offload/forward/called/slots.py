"""The weights of the experts in one layer's slots, as parameters; and whether anything has kept or changed them."""

from __future__ import annotations

from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...memory.buffers import NOTHING, Rows
from ...runtime.layer import LayerRuntime


class SlotWeights:
    """`of(slot)[field]` is that field of whatever expert is in the slot: a view of it, which costs no memory."""

    def __init__(self, layer: LayerRuntime):
        if layer.calls is None:
            raise AssertionError(f"{layer.moe.name}: its experts are not called")
        self._arrivals, self.calls, self._seen = layer.arrivals, layer.calls, NOTHING
        self._views: list[dict[str, nn.Parameter]] = []
        self._storage: Any = None

    def of(self, slot: int) -> dict[str, nn.Parameter]:
        rows = self._arrivals.slots
        if rows is not self._seen:  # slots have become others
            self._make(rows)
        return self._views[slot]

    def forget(self) -> None:
        """Let go of the slots' memory."""
        self._seen, self._views, self._storage = NOTHING, [], None

    def state(self, views: dict[str, nn.Parameter]) -> tuple[int, int, int]:
        """Changes where somebody has kept `views` of a slot, or a view of one, or has written to it.

        Two holders of one parameter are two references in Python, and of a view of it two of its storage. What loads
        rows may write as well; then versions say nothing.
        """
        rows = self._seen.bytes  # made in inference mode, it counts no versions
        version = 0 if rows.is_inference() else rows._version - self.calls.written
        return sum(map(getrefcount, views.values())), torch._C._storage_Use_Count(self._storage._cdata), version

    def refuse_changes(self, before: tuple[int, int, int], views: dict[str, nn.Parameter], name: str) -> None:
        """Raise where `state` is not what it was before an expert was called."""
        after = self.state(views)
        if after[2] != before[2]:
            raise UnsupportedModelError(
                f"{name}: an expert changes its own weights while it is called, which would be lost with its slot; "
                "such experts cannot be offloaded"
            )
        if after[:2] > before[:2]:
            raise UnsupportedModelError(
                f"{name}: something has kept a view of an expert's weights beyond its call (the expert itself, or a "
                "hook in it), and the slot will hold another expert's next; keep a copy (.clone()) instead"
            )

    def release(self, output: Any) -> Any:
        """An expert's `output`, with a copy of whatever in it is a view of the slot."""
        begin = self._seen.bytes.data_ptr()
        return _map(output, lambda x: x.clone() if begin <= x.data_ptr() < begin + self._seen.bytes.nbytes else x)

    def _make(self, rows: Rows) -> None:
        fields = self._arrivals.moe.layout.fields
        with torch.inference_mode(False):
            self._views = [
                {field.name: nn.Parameter(field.view_in(row), requires_grad=False) for field in fields}
                for row in rows.bytes
            ]
        self._seen, self._storage = rows, rows.bytes.untyped_storage()


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
