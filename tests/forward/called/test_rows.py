"""One expert's weight as code holds it: read when it is used, a view as long as it is not, and never NaN."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moe_offload.errors import RoutingError, UnsupportedModelError
from moe_offload.experts import RowLayout
from moe_offload.forward.called.row import ExpertRow
from moe_offload.forward.called.stack import Stack

E, H, INNER = 4, 6, 10


class OneSlot:
    """A source with a single slot, which holds NaN once another expert has taken it."""

    name = "layer"

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights, self.asked, self.inside = weights, [], 0
        self.slot = {field: torch.empty_like(stack[0]) for field, stack in weights.items()}

    @contextlib.contextmanager
    def entered(self):
        self.inside += 1
        yield
        self.inside -= 1

    def take(self, expert, field, tokens):
        assert self.inside
        self.asked.append((expert, tokens))
        for name, slot in self.slot.items():
            slot.copy_(self.weights[name][expert])
        return self.slot


@pytest.fixture
def source():
    torch.manual_seed(0)
    return OneSlot({"up": torch.randn(E, INNER, H), "bias": torch.randn(E, INNER)})


def stack_of(source, field="up", joined=False) -> Stack:
    like = source.weights[field]
    found = next(f for f in RowLayout.of(source.weights).fields if f.name == field)
    return Stack.of(source, found, like.flatten(0, 1) if joined else like, torch.full_like(like[0], float("nan")))


USES = {
    "linear": lambda w, x: functional.linear(x, w),
    "matmul": lambda w, x: x @ w.T,
    "of a transpose": lambda w, x: x.matmul(w.transpose(0, 1)),
    "of a part": lambda w, x: x @ w[:5].t(),
    "of chunks": lambda w, x: [functional.linear(x, part) for part in w.chunk(2)],
    "of a split": lambda w, x: [functional.linear(x, part) for part in w.split([3, 7])],
    "of one in a batch": lambda w, x: torch.bmm(x[None], w[None].mT),
    "in another dtype": lambda w, x: functional.linear(x.double(), w.to(torch.float64)),
    "in its own dtype": lambda w, x: functional.linear(x, w.to(torch.float32)),
    "its data": lambda w, x: functional.linear(x, w.data.detach().contiguous()),
    "reshaped": lambda w, x: x @ w.view(-1).reshape(INNER, H).permute(1, 0),
    "row by row": lambda w, x: [x @ one for one in w],
    "with numbers": lambda w, x: (w * 2 + 1, 2 / w, w.sum().item(), torch.equal(w, w)),
    "into another": lambda w, x: torch.zeros(INNER, H).add_(w).copy_(w),
    "joined": lambda w, x: torch.cat([w, w]),
    "by keyword": lambda w, x: functional.linear(input=x, weight=w),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("e", [2, -1, torch.tensor(3)])
def test_what_is_computed_with_a_row_is_what_the_weight_gives(source, use, e):
    x = torch.randn(3, H)
    got = USES[use](stack_of(source)[e], x)
    want = USES[use](source.weights["up"][e], x)
    assert str(got) == str(want) and not isinstance(got, ExpertRow)
    assert {expert for expert, _ in source.asked} == {int(e) % E}


def test_rows_that_are_kept_are_those_of_their_expert(source):
    """There is one slot, and each of them was in it."""
    rows = [stack_of(source)[e] for e in range(E)]
    turned = [row.T for row in rows]
    assert not source.asked
    x = torch.randn(3, H)
    for e in (3, 0, 2, 1):
        assert torch.equal(x @ turned[e], x @ source.weights["up"][e].T)
    assert torch.equal(torch.stack(rows), source.weights["up"])
    assert torch.equal(rows[0] - rows[1], source.weights["up"][0] - source.weights["up"][1])


def test_two_weights_of_an_expert_are_used_together(source):
    x = torch.randn(3, H)
    up, bias = stack_of(source)[1], stack_of(source, "bias")[1]
    assert torch.equal(
        functional.linear(x, up, bias), functional.linear(x, source.weights["up"][1], source.weights["bias"][1])
    )
    assert source.asked == [(1, 3)]


def test_an_input_of_no_rows_reads_nothing(source):
    out = functional.linear(torch.randn(0, H), stack_of(source)[1])
    assert out.shape == (0, INNER) and type(out) is torch.Tensor and not source.asked


def test_looks_read_nothing(source):
    row = stack_of(source)[1]
    assert (row.shape, row.dtype, row.device.type, len(row), row.numel()) == (
        (INNER, H),
        torch.float32,
        "cpu",
        INNER,
        60,
    )
    assert (
        row.T.shape == (H, INNER)
        and row.is_contiguous()
        and not row.T.is_contiguous()
        and "up of expert 1" in repr(row)
    )
    assert not source.asked


@pytest.mark.parametrize("take", ["unbind", "iterate", "chunk", "split", "list", "select"])
def test_all_rows_at_once_are_read_one_by_one(source, take):
    stack = stack_of(source)
    rows = {
        "unbind": lambda: stack.unbind(0),
        "iterate": lambda: list(iter(stack)),
        "chunk": lambda: [row.squeeze(0) for row in stack.chunk(E, dim=0)],
        "split": lambda: [row[0] for row in torch.split(stack, 1)],
        "list": lambda: list(stack),
        "select": lambda: [stack.select(0, e) for e in range(E)],
    }[take]()
    assert not source.asked and len(rows) == E
    x = torch.randn(3, H)
    for e in (2, 0):
        assert torch.equal(functional.linear(x, rows[e]), functional.linear(x, source.weights["up"][e]))


@pytest.mark.parametrize(
    "index", [1, torch.tensor([1]), (1,), (1, slice(None), 0), (torch.tensor(1), slice(2, 5))], ids=str
)
def test_an_index_may_be_written_in_several_ways(source, index):
    got, want = stack_of(source)[index], source.weights["up"][index]
    assert got.shape == want.shape and torch.equal(got + 0, want)


def test_experts_that_are_joined_in_the_first_dimension(source):
    stack = stack_of(source, joined=True)
    assert stack.shape == (E * INNER, H)
    x = torch.randn(3, H)
    for e in range(E):
        assert torch.equal(x @ stack.view(-1, INNER, H)[e].T, x @ source.weights["up"][e].T)
    with pytest.raises(UnsupportedModelError, match="layer: __getitem__ was asked of up"):
        stack[0]


@pytest.mark.parametrize("index", [E, -E - 1])
def test_an_expert_that_is_none_is_told(source, index):
    with pytest.raises(RoutingError, match=f"expert {index} was asked for, but up has experts 0..3"):
        stack_of(source)[index]


OF_A_STACK = {
    "__getitem__": lambda w: w[torch.tensor([0, 1])],
    "sum": lambda w: w.sum(),
    "matmul": lambda w: torch.randn(3, H) @ w.mT,
    "bmm": lambda w: torch.bmm(torch.randn(E, 3, H), w.transpose(1, 2)),
    "transpose": lambda w: w.transpose(0, 1)[0],
    "chunk": lambda w: w.chunk(2),
    "clone": lambda w: w.clone(),
    "view": lambda w: w.view(-1),
    "to": lambda w: w.to(torch.float64),
    "data_ptr": lambda w: w.data_ptr(),
    "numpy": lambda w: w.numpy(),
    "mul_": lambda w: w.mul_(2),
    "__set__": lambda w: setattr(w, "data", torch.zeros(E, INNER, H)),
    "slice": lambda w: w[1:3],
    "mask": lambda w: w[torch.tensor([True, False, False, False])],
    "stack": lambda w: torch.stack([w, w]),
    "deepcopy": copy.deepcopy,
}
OF_A_ROW = {
    "mul_": lambda w: w.mul_(2),
    "__imul__": lambda w: w.__imul__(2),
    "__setitem__": lambda w: w.__setitem__(0, 1.0),
    "of a view": lambda w: w.T.zero_(),
    "__set__": lambda w: setattr(w, "data", torch.zeros(INNER, H)),
    "out": lambda w: torch.add(torch.ones(INNER, H), 1, out=w),
    "in a list": lambda w: torch._foreach_mul_([w], 2),
    "inplace": lambda w: functional.silu(w, inplace=True),
    "data_ptr": lambda w: w.data_ptr(),
    "numpy": lambda w: w.numpy(),
    "untyped_storage": lambda w: w.untyped_storage(),
    "dropout": lambda w: functional.dropout(w, training=False),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("use", OF_A_STACK)
def test_anything_else_of_a_stack_raises_and_names_the_module(source, use):
    with pytest.raises(UnsupportedModelError, match=r"^layer: .* was asked of up"):
        OF_A_STACK[use](stack_of(source))


@pytest.mark.parametrize("use", OF_A_ROW)
def test_what_would_change_or_keep_a_slot_raises_and_names_the_module(source, use):
    stack_of(source)[1].sum()
    with pytest.raises(UnsupportedModelError, match=r"^layer: .* was asked of the up of expert 1"):
        OF_A_ROW[use](stack_of(source)[1])
    assert torch.equal(source.slot["up"], source.weights["up"][1]), "what is in the slot is used again"


@pytest.mark.parametrize("use", ["of a stack", "of a row"])
def test_nobody_computes_with_what_has_no_elements(source, use):
    """Not even where `__torch_function__` is not asked: the product was of elements that are nobody's."""
    weight = stack_of(source) if use == "of a stack" else stack_of(source)[1]
    x = torch.randn(3, H)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(UnsupportedModelError, match=r"^layer: "):
        torch.matmul(x, weight.mT)
    with torch._C.DisableTorchFunction(), pytest.raises(UnsupportedModelError, match=r"^layer: "):
        torch.mul(weight, 2)


def test_a_stack_looks_as_the_real_one_does(source):
    """Its rows lie on top of each other, and code may ask how they lie."""
    for joined in (False, True):
        stack = stack_of(source, joined=joined)
        want = source.weights["up"].flatten(0, 1) if joined else source.weights["up"]
        assert stack.is_contiguous() and stack.stride() == want.stride() and stack.stride(0) == want.stride(0)
        again = stack.contiguous().reshape(E, INNER, H).to(torch.float32).float().to("cpu")
        x = torch.randn(3, H)
        assert torch.equal(x @ again[2].T, x @ source.weights["up"][2].T)
    with pytest.raises(RuntimeError, match="invalid for input of size"):  # as of the real one
        stack_of(source).view(7, -1)


#: What would take memory for all experts, to be refused all the same.
LARGE = {
    "double": lambda w: w.double(),
    "to": lambda w: w.to(dtype=torch.bfloat16),
    "to a copy": lambda w: w.to(w.dtype, copy=True),
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
    "reshape": lambda w: w.reshape(-1),
    "of a sum": lambda w: w + 1,
}


class Allocations(TorchDispatchMode):
    """How many elements copies and sums have, where memory is taken for them."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.add):
            self.elements += [] if out.is_meta else [out.numel()]
        return out


@pytest.mark.parametrize("use", LARGE)
def test_what_is_refused_of_a_stack_takes_no_memory_before(source, use):
    stack = stack_of(source)
    with Allocations() as made, pytest.raises(UnsupportedModelError, match=r"^layer: "):
        LARGE[use](stack)
    assert max(made.elements, default=0) <= 1


COPIES = {
    "double": lambda w: w.double(),
    "to a copy": lambda w: w.to(w.dtype, copy=True),
    "reshape": lambda w: w.T.reshape(-1),
    "contiguous": lambda w: w.T.contiguous(),
    "clone": lambda w: w.clone(),
}


@pytest.mark.parametrize("use", COPIES)
def test_a_copy_of_a_row_is_made_once(source, use):
    """And none before of what has no elements."""
    with Allocations() as made:
        copied = COPIES[use](stack_of(source)[1])
    assert torch.equal(copied, COPIES[use](source.weights["up"][1])) and not isinstance(copied, ExpertRow)
    assert sum(size == copied.numel() for size in made.elements) == 1


def test_a_stack_in_a_module_is_its_parameter(source):
    module = nn.Module()
    module.up = stack_of(source)
    assert dict(module.named_parameters())["up"] is module.up
    assert type(module.state_dict()["up"]) is Stack, "to be replaced by real rows; NaN it cannot become"


def test_gradients_are_refused_where_they_would_be_lost(source):
    from moe_offload.errors import OffloadError

    out = functional.linear(torch.randn(3, H, requires_grad=True), stack_of(source)[1])
    with pytest.raises(OffloadError, match="inference only"):
        out.sum().backward()
