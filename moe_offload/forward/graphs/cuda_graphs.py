"""What lets a decode step be recorded once and launched as a CUDA graph: addresses and sizes that stay.

Inductor records a step for each set of sizes and of *static* addresses. Every other input is copied at each launch, and
one that is mutated without being static keeps the step from being recorded at all. So, one by one:

    bank       static: it comes in through the placeholder of a parameter, and all parameters are
    KV cache   a static one is, once marked: transformers marks what it makes outside of a trace, and our prefill is one
    sizes      constants, or lengths of a static KV cache, of which there are few (`kv_pool.py`): recorded for each
    counters   of a sliding window, numbers that go in and come out: Inductor's partitions leave them outside
    outputs    copied out: the next launch writes over them, and torch refuses one that was kept
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node


class StaticCaches:
    """Marks the tensors of static KV caches, each cache once, as soon as all of its layers have theirs."""

    def __init__(self) -> None:
        self._marked: weakref.ref[Any] = weakref.ref(StaticCaches)

    def mark(self, cache: Any) -> None:
        """`cache` is what a forward is given as past_key_values; what is no static cache is left alone."""
        if cache is None or self._marked() is cache or not getattr(cache, "is_compileable", False):
            return
        layers = list(cache.layers)
        for tensor in (tensor for layer in layers for tensor in _tensors(vars(layer).values())):
            torch._dynamo.mark_static_address(tensor, guard=False)  # another address is no other graph
        if all(getattr(layer, "is_initialized", True) for layer in layers):
            self._marked = weakref.ref(cache)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def can_be_recorded(graph: Graph) -> bool:
    """Whether all sizes in a decode step are constants, or those of inputs that stay where they are.

    A KV cache that grows is another size at each step, and recording takes a hundred times longer than running; the
    first step with one has constants as well, so there must be a static cache. A number that changes does no harm while
    it is only counted on and handed back: kernels never see it.
    """
    from torch.fx.experimental.symbolic_shapes import free_symbols

    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not any(_static_type(node) == "unguarded" for node in inputs):
        return False
    steady = {symbol for node in inputs if is_static(node) for symbol in free_symbols(_value(node))}
    moved = {node for node in inputs if not steady.issuperset(free_symbols(_value(node)))}
    if any(isinstance(_value(node), Tensor) for node in moved):
        return False
    for node in graph.nodes:  # in running order
        if node.op != "output" and not moved.isdisjoint(node.all_input_nodes):
            if not isinstance(_value(node), (int, torch.SymInt)):
                return False
            moved.add(node)
    return True


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def is_static(node: Node) -> bool:
    """Whether this input stays where it is. A bank that did not would be copied at each launch, and `place` refuse the
    copy."""
    return _static_type(node) is not None


def _static_type(node: Node) -> str | None:
    """'unguarded' for what `StaticCaches` marks; parameters are 'guarded'."""
    marked: str | None = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return marked


def copy_outputs(outputs: Any) -> Any:
    """The outputs of a launch, in memory of their own."""
    return type(outputs)(x.clone() if isinstance(x, Tensor) else x for x in outputs)
