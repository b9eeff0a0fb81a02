"""Inductor's small kernels that do not need each other, launched as one: those that reduce together with those that do
not.

Inductor puts the two kinds in kernels of their own, because with one size of block for all parts one of them would get
a bad one. From torch 2.13 on each part may have its own. In a decode step that is one launch less for each layer:
values are written to a KV cache while queries and keys are normalised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

OWN_BLOCKS = "combo_kernel_per_subkernel_blocks"  # the option by which each part has its own size


def options() -> dict[str, Any]:
    """Inductor's options for launching small kernels together, as far as this torch has them."""
    from torch._inductor import config

    return {"combo_kernels": True, **({OWN_BLOCKS: True} if hasattr(config, OWN_BLOCKS) else {})}


@contextlib.contextmanager
def both_kinds_together() -> Iterator[None]:
    """What is compiled meanwhile with `options()` has both kinds in one kernel, where Inductor would have two."""
    try:
        from torch._inductor.codegen import triton_combo_kernel as combo
    except ImportError:  # without Triton there are none of these kernels
        yield
        return
    before = combo._custom_combo_kernel_horizontal_partition_algorithm

    def partition(nodes: list[Any], scheduling: Any, facts: Any) -> list[list[Any]]:
        return _join(before(nodes, scheduling, facts), nodes, facts)

    combo.set_custom_combo_kernel_horizontal_partition(partition)
    try:
        yield
    finally:
        combo.set_custom_combo_kernel_horizontal_partition(before)


def _join(parts: list[list[Any]], nodes: list[Any], facts: Any) -> list[list[Any]]:
    """The same `parts`, but what may be launched together of one dimension (beside what is reduced) is one part."""
    from torch._inductor import config

    if not getattr(config, OWN_BLOCKS, False):
        return parts
    small = [part for part in parts if len(part) > 1 or _is_small(part[0], facts)]
    joined = {id(node) for part in small for node in part if len(facts[node].tiling) == 2}
    left = [[node for node in part if id(node) not in joined] for part in parts]
    return [part for part in ([node for node in nodes if id(node) in joined], *left) if part]


def _is_small(node: Any, facts: Any) -> bool:
    """Whether Inductor would launch it with others: it leaves large ones alone."""
    from torch._inductor.codegen.triton_combo_kernel import LARGE_NUMELS
    from torch._inductor.virtualized import V

    sizes = [V.graph.sizevars.optimization_hint(size, fallback=1) for size in facts[node].tiling.values()]
    return all(size <= (LARGE_NUMELS if not facts[node].features.is_reduction() else 2048) for size in sizes)
