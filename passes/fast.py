"""Products of a few pairs by kernels that may round otherwise than the model's own. Only where the user asked for it.

    before   s = moe_offload.grouped_mm(x, V, slots)            each product as the unmodified model computes it
    after    s = moe_offload.fast_grouped_mm(x, V, slots)       at memory speed, in another order of sums

The graph keeps all else: routing, activation and weighting round as they did. In a graph of the model a product is
replaced where its pairs are a constant that is small enough; in a core all are, and `Core` runs it for few pairs alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from torch.fx import Graph, GraphModule, Node

from . import ops
from .sites import Site


def speed_up_products(graph: Graph, *, sites: Sequence[Site], few_pairs: Mapping[Hashable, int]) -> list[Site]:
    """Replace the products of every site that was renamed to slots and has at most `few_pairs` of its layer."""
    done = []
    for site in sites:
        products = [node for node in graph.nodes if node.target is ops.grouped_mm and is_of(node, site)]
        if products and site.pairs is not None and site.pairs <= few_pairs.get(site.layer, 0):
            _replace(products)
            done.append(site)
    return done


def speed_up_core(core: GraphModule) -> GraphModule:
    """`core` with all of its products replaced, as a module of its own."""
    fast = GraphModule(core, Graph())
    fast.graph.output(fast.graph.graph_copy(core.graph, {}))
    _replace([node for node in fast.graph.nodes if node.target is ops.grouped_mm])
    fast.graph.lint()
    fast.recompile()
    return fast


def _replace(products: Sequence[Node]) -> None:
    for node in products:
        node.target = ops.fast_grouped_mm


def is_of(product: Node, site: Site) -> bool:
    """Whether a product reads the bank of this site, which its weight is a view of."""
    node = product.args[1]
    while isinstance(node, Node) and node is not site.bank and node.op != "placeholder":
        node = node.args[0]
    return node is site.bank
