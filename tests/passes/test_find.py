"""Where experts are read: each pattern on the smallest graph that has it, and what no pattern knows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Graph, Node

import passes
from passes.find import PATTERNS, match_grouped, match_indexed
from passes.sites import WeightRead

E, H = 4, 8


class Reader:
    """A graph with the placeholders `x`, `ids` and `weight`, to which a test adds what reads the weight."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.x, self.ids, self.weight = (self.graph.placeholder(name) for name in ("x", "ids", "weight"))

    def call(self, function, *args, **kwargs) -> Node:
        return self.graph.call_function(function, args, kwargs)

    def method(self, name: str, *args) -> Node:
        return self.graph.call_method(name, args)

    def item(self, value: Node, index) -> Node:
        import operator

        return self.call(operator.getitem, value, index)

    def sort(self) -> tuple[Node, Node]:
        """(sorted ids, their order)"""
        both = self.call(torch.sort, self.ids)
        return self.item(both, 0), self.item(both, 1)

    def offsets(self, ids: Node) -> Node:
        counts = self.call(torch.histc, self.method("int", ids), bins=E, min=0, max=E - 1)
        return self.call(torch.cumsum, counts, dim=0, dtype=torch.int32)

    def sites(self, **more: Node) -> list[passes.Site]:
        weights = {self.weight: passes.Weight("layer 0", "weight", E)}
        weights |= {node: passes.Weight("layer 0", name, E) for name, node in more.items()}
        return passes.find_sites(self.graph, weights)


def read_by_index(reader: Reader) -> Node:
    return reader.item(reader.weight, reader.ids)


def read_by_groups(reader: Reader) -> Node:
    ids, _ = reader.sort()
    return reader.call(nn.functional.grouped_mm, reader.x, reader.weight, offs=reader.offsets(ids))


def read_all_at_once(reader: Reader) -> Node:
    return reader.call(torch.bmm, reader.x, reader.weight)


READERS = {"indexed": read_by_index, "grouped": read_by_groups, "masked": read_all_at_once}


@pytest.mark.parametrize("name", PATTERNS)
def test_each_pattern_finds_its_own_form_and_no_other(name):
    """A new pattern needs an entry in `READERS`."""
    for form, read in READERS.items():
        found = PATTERNS[name](read(Reader()))
        assert (found is not None) == (form == name)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_site_says_who_reads_what(name):
    reader = Reader()
    node = READERS[name](reader)
    (site,) = reader.sites()
    ids = reader.x if name == "masked" else reader.ids
    assert (site.layer, site.num_experts, site.ids) == ("layer 0", E, ids)
    assert site.weights == {"weight": reader.weight} and site.bank is reader.weight
    assert [read.node for read in site.reads] == [node]
    assert site.grouped == (name == "grouped") and (site.order is not None) == (name == "grouped")
    assert site.masked == (name == "masked")
    assert site.reads_weights


@pytest.mark.parametrize(
    "index", [lambda ids: ids, lambda ids: (ids,), lambda ids: [ids]], ids=["node", "tuple", "list"]
)
def test_an_index_may_be_written_in_several_ways(index):
    reader = Reader()
    assert match_indexed(reader.item(reader.weight, index(reader.ids))) == WeightRead(
        next(reversed(reader.graph.nodes)), reader.ids
    )


def test_index_select_is_an_index():
    reader = Reader()
    node = reader.method("index_select", reader.weight, 0, reader.ids)
    assert match_indexed(node) == WeightRead(node, reader.ids)


@pytest.mark.parametrize("index", [0, slice(0, 2), (slice(None), 0)])
def test_an_index_that_is_no_tensor_is_no_read_by_experts(index):
    reader = Reader()
    reader.item(reader.weight, index)
    with pytest.raises(
        passes.UnknownUse, match=r"layer 0: the graph uses 'weight' in a way no pattern knows: .*getitem"
    ):
        reader.sites()


def test_a_weight_is_followed_through_its_views():
    reader = Reader()
    first = reader.method("transpose", reader.weight, 1, 2)
    second = reader.method("contiguous", first)
    node = reader.item(second, reader.ids)
    (site,) = reader.sites()
    assert site.reads == [WeightRead(node, reader.ids, (first, second))] and site.reads[0].entry is first


@pytest.mark.parametrize("way", ["weight first", "one matrix for all"])
def test_a_product_over_all_experts_has_their_inputs_first(way):
    reader = Reader()
    reader.x.meta["example_value"] = torch.empty(E, 3, H) if way == "weight first" else torch.empty(3, H)
    reader.weight.meta["example_value"] = torch.empty(E, H, H)
    reader.call(torch.matmul, *((reader.weight, reader.x) if way == "weight first" else (reader.x, reader.weight)))
    with pytest.raises(passes.UnknownUse, match=r"layer 0: .*matmul"):
        reader.sites()


def test_a_masked_layer_that_is_called_twice_has_two_sites():
    reader = Reader()
    other = reader.graph.placeholder("other")
    first = reader.call(torch.bmm, reader.x, reader.weight)
    second = reader.call(torch.bmm, first, other)
    third = reader.call(torch.bmm, second, reader.weight)
    fourth = reader.call(torch.bmm, third, other)
    one, two = reader.sites(other=other)
    assert (one.ids, two.ids) == (reader.x, second)
    assert [[read.node for read in site.reads] for site in (one, two)] == [[first, second], [third, fourth]]


VIEWS_ACROSS = {
    "transpose": (0, 1),
    "transpose of the last": (1, -3),
    "permute": (1, 0, 2),
    "permute of a list": ([2, 1, 0],),
}


@pytest.mark.parametrize("view", VIEWS_ACROSS)
@pytest.mark.parametrize("form", READERS)
def test_a_view_that_moves_the_experts_is_not_followed(form, view):
    """What is indexed afterwards is another dimension: renamed to slots it would be silently wrong."""
    reader = Reader()
    reader.weight.meta["example_value"] = torch.empty(E, H, H)
    original, reader.weight = reader.weight, reader.method(view.split()[0], reader.weight, *VIEWS_ACROSS[view])
    READERS[form](reader)
    reader.weight = original
    with pytest.raises(passes.UnknownUse, match=f"layer 0: .*{view.split()[0]}"):
        reader.sites()


def test_a_selection_of_another_dimension_is_no_choice_of_experts():
    reader = Reader()
    reader.method("index_select", reader.weight, 1, reader.ids)
    with pytest.raises(passes.UnknownUse, match="index_select"):
        reader.sites()


def test_a_bias_of_the_grouped_form_belongs_to_the_ids_before_their_sort():
    reader = Reader()
    bias = reader.graph.placeholder("bias")
    ids, order = reader.sort()
    reader.call(nn.functional.grouped_mm, reader.x, reader.weight, offs=reader.offsets(ids))
    reader.item(bias, reader.method("long", ids))
    (site,) = reader.sites(bias=bias)
    assert site.ids is reader.ids and site.reader_ids is ids and site.order is order
    assert list(site.weights) == ["weight", "bias"] and len(site.reads) == 2


@pytest.mark.parametrize("spoil", ["offsets of a placeholder", "unsorted ids", "the order, not the ids"])
def test_groups_of_another_making_are_not_known(spoil):
    """Offsets that do not follow from the sorted ids would not follow the slots."""
    reader = Reader()
    _, order = reader.sort()
    offsets = {
        "offsets of a placeholder": lambda: reader.ids,
        "unsorted ids": lambda: reader.offsets(reader.ids),
        "the order, not the ids": lambda: reader.offsets(order),
    }[spoil]()
    node = reader.call(nn.functional.grouped_mm, reader.x, reader.weight, offs=offsets)
    assert match_grouped(node) is None
    with pytest.raises(passes.UnknownUse):
        reader.sites()


def test_two_calls_of_one_module_are_two_sites_in_running_order():
    reader = Reader()
    later = reader.method("clone", reader.ids)
    reader.item(reader.weight, later)
    reader.item(reader.weight, reader.ids)
    assert [site.ids for site in reader.sites()] == [reader.ids, later]


def test_a_use_of_the_whole_stack_is_refused_by_the_name_of_module_and_weight():
    reader = Reader()
    reader.call(torch.mul, reader.x, reader.weight)
    with pytest.raises(passes.UnknownUse, match="layer 0: the graph uses 'weight'") as refused:
        reader.sites()
    assert refused.value.layer == "layer 0"


def test_pairs_are_known_only_where_they_are_a_constant():
    reader = Reader()
    read_by_index(reader)
    (site,) = reader.sites()
    assert site.pairs is None
    reader.ids.meta["example_value"] = torch.zeros(6, dtype=torch.int64)
    assert site.pairs == 6
