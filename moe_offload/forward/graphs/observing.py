"""The backend of `record_profile` for a model that is not offloaded: its graphs only count which experts are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

import passes
from passes import ops

from ...experts import MoELayer
from .compiling import Compiled


def observing_backend(weights: dict[int, tuple[MoELayer, str]]) -> Compiled:
    """A backend that only counts: `weights` maps the id of each stacked parameter to its layer and field."""

    def backend(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Compiled:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        found = {
            node: passes.Weight(weights[id(x)][0].name, weights[id(x)][1], weights[id(x)][0].num_experts)
            for node, x in zip(placeholders, example_inputs, strict=True)
            if id(x) in weights
        }
        passes.run_passes(gm.graph, passes.observe_pipeline(passes.find_sites(gm.graph, found)))
        gm.recompile()
        run: Compiled = gm.forward
        return run

    return backend


def bind_counter(moe: MoELayer, counter: ops.Observer) -> None:
    """Let instrumented graphs reach `counter` through any of the layer's weights."""
    for param in moe.params.values():
        ops.bind(param, counter)


def unbind_counter(moe: MoELayer) -> None:
    for param in moe.params.values():
        ops.unbind(param)
