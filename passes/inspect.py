"""What a graph calls and how often, and what a pass has changed in that."""

from __future__ import annotations

from collections import Counter

from torch.fx import Graph

from .find import name_of


def op_counts(graph: Graph) -> Counter[str]:
    """How often each function or method is called."""
    return Counter(name_of(node) for node in graph.nodes if node.op.startswith("call"))


def describe_change(before: Counter[str], after: Counter[str]) -> str:
    """'+2 fetch, +2 wait, -1 histc': what a pass added and removed."""
    delta = {name: after[name] - before[name] for name in sorted({*before, *after}) if after[name] != before[name]}
    return ", ".join(f"{count:+d} {name}" for name, count in delta.items()) or "left alone"
