"""`Phantom`: the placeholder parameter that an offloaded experts module has in place of its stacked expert weights.

("Phantom" is this project's word for it.) In a traced graph the passes put the bank in its place (`compiling.py`);
eager code never reads it (`patch/install.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...experts import Field
from ...runtime.layer import LayerRuntime


class Phantom(nn.Parameter):
    """Takes the place of a stacked weight `[E, ...]` whose rows rest in a store.

    One row of NaN seen E times (stride 0): it traces like the real weight, takes the memory of one row, and a use that
    no pass has rewritten gives NaN rather than another expert's result.
    """

    layer: LayerRuntime
    field: Field

    @staticmethod
    def of(layer: LayerRuntime, field: Field, rows: dict[Hashable, Tensor]) -> Phantom:
        """`rows` shares the NaN rows of a model: all phantoms of one shape and dtype see the same one."""
        key = field.shape, field.dtype
        if key not in rows:
            device = layer.slots.bank_SN.device
            rows[key] = torch.full((1, *field.shape), float("nan"), dtype=field.dtype, device=device)
        expanded = rows[key].expand(layer.moe.num_experts, *field.shape)
        phantom = cast(Phantom, nn.Parameter(expanded, requires_grad=False))
        phantom.layer, phantom.field = layer, field
        return phantom


def phantoms_in(inputs: Iterable[Any]) -> dict[int, Phantom]:
    """`{position: phantom}` among the inputs of a graph."""
    return {i: cast(Phantom, x) for i, x in enumerate(inputs) if isinstance(x, nn.Parameter) and hasattr(x, "field")}
