"""Look at a graph: what it calls and how often, and its text before and after a pass."""

from __future__ import annotations

import difflib
from collections import Counter

from torch.fx import Graph

from .find import name_of


def op_counts(graph: Graph) -> Counter[str]:
    """How often each function or method is called."""
    return Counter(name_of(node) for node in graph.nodes if node.op.startswith("call"))


def graph_text(graph: Graph) -> str:
    """One line per node, as fx prints it."""
    return "\n".join(line for node in graph.nodes if (line := node.format_node()))


def describe_change(before: Counter[str], after: Counter[str]) -> str:
    """'+2 fetch, +2 wait, -1 histc': what a pass added and removed."""
    delta = {name: after[name] - before[name] for name in sorted({*before, *after}) if after[name] != before[name]}
    return ", ".join(f"{count:+d} {name}" for name, count in delta.items()) or "left alone"


def diff_texts(before: str, after: str) -> str:
    """A unified diff of two texts, for reading."""
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1))
