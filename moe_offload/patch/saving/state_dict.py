"""state_dict() of an offloaded model: the real experts in place of their phantoms.

It has to hold what it returns: all experts at once, in RAM. `saver.py` writes them a row at a time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from ...errors import SaveError
from ...experts import Place
from ...runtime.model import Runtime

#: Whether state_dict() leaves the experts' phantoms as they are, for callers that want names and shapes only.
_as_phantoms: ContextVar[bool] = ContextVar("as_phantoms", default=False)


def fill_state_dict(runtime: Runtime) -> None:
    """Make state_dict() return real weights in place of phantoms."""
    for layer in runtime.layers:
        for module, places in zip(layer.moe.modules, layer.moe.places, strict=True):
            module.register_state_dict_post_hook(partial(_real_rows, runtime, layer.moe.index, places))


@contextlib.contextmanager
def phantoms_only() -> Iterator[None]:
    """state_dict() leaves phantoms as they are, in this thread."""
    token = _as_phantoms.set(True)
    try:
        yield
    finally:
        _as_phantoms.reset(token)


def refuse_phantoms(state: Mapping[str, Tensor]) -> None:
    """Raise `SaveError` for a state_dict that has phantoms in it, which are NaN."""
    for key, tensor in state.items():
        if hasattr(tensor, "field"):
            raise SaveError(
                f"state_dict: {key} is a phantom (NaN in place of offloaded experts), as model.parameters() gives it; "
                "nothing was written. Pass what model.state_dict() returns, or no state_dict at all"
            )


def _real_rows(
    runtime: Runtime,
    index: int,
    places: Sequence[Place],
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _: Any,
) -> None:
    if _as_phantoms.get():
        return
    runtime.check_open()
    if any(place.expert is None for place in places):
        stacked = runtime.read_stacked(index)
        shapes = {place.key: place.tensor.shape for place in places}  # a stack may be shorter, or joined in one matrix
        for place in places:
            whole = stacked[place.field].flatten()[: shapes[place.key].numel()]
            state[prefix + place.key] = whole.view(shapes[place.key])
        return
    fields = {field.name: field for field in runtime.layers[index].moe.unpacked.fields}
    for e, own in itertools.groupby(places, key=lambda place: place.expert):
        row = runtime.read_unpacked(index, cast(int, e))
        state.update({prefix + place.key: fields[place.field].view_in(row).clone() for place in own})
