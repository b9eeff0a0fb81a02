"""`backend="moe_offload"` for a torch.compile by the user. `graphs/compiling.py` compiles the model's own call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ..errors import OffloadError
from .graphs.compiling import Compiled, core_inductor, make_backend, run_inductor
from .graphs.phantom import phantoms_in


def moe_offload(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
    """`torch.compile(model, backend="moe_offload")`, found through the `torch_dynamo_backends` entry point.

    A model that went through `optimize()` needs no torch.compile of yours: its own call is compiled already. Given one,
    the experts appear as one op a layer, which is complete by itself. `mode` and `options` are those of Inductor.
    """
    uses_us = any(str(node.target).startswith("moe_offload.") for node in gm.graph.nodes)
    if not uses_us and not phantoms_in(example_inputs):
        raise OffloadError(
            "torch.compile(backend='moe_offload') was given a model without offloaded experts; call "
            "moe_offload.optimize(model, budget=...) first (the model it returns is compiled on its first call)"
        )
    options = dict(kwargs.get("options") or {})
    if kwargs.get("mode") not in (None, "default"):
        options = {**torch._inductor.list_mode_options(kwargs["mode"]), **options}
    backend = make_backend(lambda g, inputs: run_inductor(g, inputs, **options), core_inductor, [])
    return backend(gm, example_inputs)  # type: ignore[no-any-return]
