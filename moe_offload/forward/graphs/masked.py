"""The op of last resort of a masked layer: its module's own code, where no pass has seen it.

Shapes: E experts, T tokens, H hidden, U experts of one wave, M = E*T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from passes.masked_rows import stream_rows

from ...errors import UnsupportedModelError
from ...experts import MoELayer
from ...runtime.layer import LayerRuntime
from ...runtime.lock import closed_error
from ..changed_parts import refuse_changed_parts


class MaskedLayer:
    """What the marker op of a masked layer is bound to."""

    def __init__(self, layer: LayerRuntime):
        self.layer = layer

    def masked_experts(self, x_MH: Tensor) -> Tensor:
        """The whole module: slower, never wrong."""
        layer = self.layer
        with layer.lock.here(), layer.arrivals.transfer.current():
            if layer.module_core is None:
                raise closed_error(layer.moe.name)
            x_ETH = x_MH.view(layer.moe.num_experts, -1, x_MH.shape[-1])
            outputs = x_MH.shape[-1]
            return stream_rows(x_ETH, outputs, x_MH.dtype, layer.module_core, layer.stream).flatten(0, 1)


class MaskedModuleCore:
    """The module's own code, run for some of its experts: with their rows alone as its stacks."""

    def __init__(self, moe: MoELayer, views: Callable[[Tensor], dict[str, Tensor]]):
        self.moe, self.module, self.views = moe, moe.modules[0], views

    def __call__(
        self,
        x_P: Tensor,
        slots_R: Tensor,
        bank_SN: Tensor,
        others: Sequence[Any],
        pairs_R: Tensor | slice | None = None,
    ) -> Tensor:
        """`x_P` is that of all experts [E, T, H], and a pair a whole expert."""
        self._refuse_unknown()
        x_UTH, slots_U = x_P[pairs_R], slots_R
        count, tokens = x_UTH.shape[:2]
        if count == 1:  # a batched product of one would round otherwise
            x_UTH, slots_U = x_UTH.expand(2, -1, -1), slots_U.expand(2)
        weights = {name: view[slots_U] for name, view in self.views(bank_SN).items()}
        bare = object.__new__(type(self.module))
        bare.__dict__.update(self.module.__dict__)
        bare.__dict__["_parameters"] = {**self.module._parameters, **weights}
        bare.__dict__["num_experts"] = len(slots_U)
        out: Tensor = type(self.module).forward(bare, x_UTH.reshape(-1, x_UTH.shape[-1]))
        return out.view(len(slots_U), tokens, -1)[:count]

    def _refuse_unknown(self) -> None:
        """In a graph it is seen that zeros stay zeros; here it has to be known."""
        refuse_changed_parts(self.module)
        if self.moe.packed or not type(self.module).forward.__module__.startswith("transformers."):
            raise UnsupportedModelError(
                f"{self.moe.name}: {type(self.module).__name__} multiplies all experts at once, and was not traced, so "
                "it is not known to leave zeros as they are. Call the model itself, not a torch.compile around it"
            )
