"""How the module of a masked layer is run: traced as a region, like those of the experts interface, or as one op.

It is called with hidden states [E*T, H] alone, and dispatches through nothing; so its `forward` is replaced.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .binding import banks_of_this_thread, is_cast
from .changed_parts import refuse_unseen_modes
from .dynamo import with_own_code
from .graphs import ops
from .inference_only import refuse_backward


def replace_forward(module: Any) -> None:
    """Let `module` run through its link."""
    module.__dict__["forward"] = types.MethodType(forward, module)


def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What replaces the module's own, whatever name that gives to its argument."""
    link, (hidden_states, *_) = self._moe_offload, (*args, *kwargs.values())
    if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
        raise UnsupportedModelError(
            f"{link.name}: it stacks its experts and takes one argument, which was taken for hidden states, and it is "
            f"called with {_shown(hidden_states)}; what it does with that is not known, so it cannot be offloaded"
        )
    if torch.compiler.is_dynamo_compiling():  # by this thread: whatever is running here is not run, but traced
        if link.whole and link.scope.banks == banks_of_this_thread():
            if link.compiled and is_cast(link, hidden_states):
                return run_op(self, hidden_states)
            return cast(Tensor, type(self).forward(self, ops.mark_unserved(hidden_states, link.rows)))
        return run_op(self, hidden_states)
    if torch.is_grad_enabled():
        return cast(Tensor, refuse_backward(link.run, self, hidden_states))
    return cast(Tensor, link.run(self, hidden_states))


def _shown(given: Any) -> str:
    return f"a tensor of {given.dtype}" if isinstance(given, Tensor) else f"{type(given).__name__} {given!r:.40}"


def run_op(module: Any, hidden_states: Tensor) -> Tensor:
    """Run the module as one op, which is complete by itself: for calls that have no graph of ours."""
    link = module._moe_offload
    return ops.masked_op(hidden_states, link.refusing if is_cast(link, hidden_states) else link.key)


def run_untraced(module: Any, hidden_states: Tensor) -> Tensor:
    """As `run_op`, for eager code."""
    refuse_unseen_modes(module)
    return run_op(module, hidden_states)


def make_region() -> Callable[..., Tensor]:
    def region(module: Any, hidden_states: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling():  # Dynamo is switched off, or has left this call alone
            return run_untraced(module, hidden_states)
        with torch._dynamo.error_on_graph_break(True):  # a part of a region would be no use
            return cast(
                Tensor, type(module).forward(module, ops.mark_unserved(hidden_states, module._moe_offload.rows))
            )

    return with_own_code(region, "region")
