"""The operators (torch.library) that a rewritten graph calls, and how each finds the runtime that serves it.

Shapes: T tokens, K experts per token, P = T*K token-expert pairs, S slots, H hidden.

A graph never holds a runtime. Each op takes the layer's *bank* (or, for `observe`, one of its weights) as an argument
and looks up what is bound to it, so a graph that Dynamo shares between layers still reaches the right one:

    ops.bind(bank, layer)        before the graph runs; `layer` is anything with the verbs of `Layer`
    ops.unbind(bank)             when it is gone

Every op that fills a bank declares that it mutates it. That is what keeps the op alive and in its place in Inductor,
which drops an op without a used result, and reorders one without a dependence. `place_ahead` writes to scratch only;
it names the bank so that it stays before `place` of that layer, and hands on the slots of the layer it stands in.
`observe` passes its ids through instead. `grouped_mm` is an ordinary function of its arguments, as are `gated_mm`,
silu of one half of such a product times the other half, and `fast_grouped_mm`, which may round otherwise. So are
`packed_mm`, `packed_gated_mm` and `unpack`, of weights that lie packed in the rows of a bank (see `packed`). `experts`
takes a key in place of a bank, a tensor that nobody writes into: in somebody else's torch.compile a bank that is
written into may be copied, and a copy is unknown here.
`no_gradient` is its backward, which raises when it runs. `unserved` stands in traced code that is to be rewritten: our
backend takes it out, and a graph that never came to our backend raises where it is, before it computes.
The library is opened with "DEF": a second copy of this file fails to import, rather than silently replacing the first.

Longer than 250 lines: each op is here three times, as declared, as run, and as bound, and who changes one reads all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .core import Core
from .grouped import Run, find_runs
from .grouped import grouped_mm as run_groups
from .masked_rows import find_rows, stream_rows

LIB = torch.library.Library("moe_offload", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe)

LIB.define("fetch(Tensor ids, Tensor(a!) bank) -> Tensor", tags=_TAGS)
LIB.define("place(Tensor ids, Tensor(a!) bank) -> Tensor")
LIB.define("place_top(Tensor scores, int k, Tensor(a!) bank) -> (Tensor, Tensor, Tensor)")
LIB.define("place_ahead(Tensor ids, Tensor slots, Tensor(a!) bank) -> Tensor")
LIB.define("wait(Tensor slots, Tensor(a!) bank) -> Tensor", tags=_TAGS)
LIB.define(
    "stream(Tensor x, Tensor ids, Tensor(a!) bank, Tensor[] others, int core, SymInt[] shape, ScalarType "
    "dtype) -> Tensor",
    tags=_TAGS,
)
LIB.define("stream_masked(Tensor x, Tensor(a!) bank, int core, int outputs, ScalarType dtype) -> Tensor", tags=_TAGS)
LIB.define("prefetch(Tensor ids, Tensor(a!) bank) -> ()", tags=_TAGS)
LIB.define("grouped_mm(Tensor x, Tensor weight, Tensor slots) -> Tensor", tags=(torch.Tag.needs_exact_strides,))
LIB.define("gated_mm(Tensor x, Tensor weight, Tensor slots) -> Tensor", tags=(torch.Tag.needs_exact_strides,))
LIB.define("fast_grouped_mm(Tensor x, Tensor weight, Tensor slots) -> Tensor", tags=(torch.Tag.needs_exact_strides,))
for _name in ("packed_mm", "packed_gated_mm"):
    LIB.define(
        f"{_name}(Tensor x, Tensor bank, Tensor slots, int weight, bool transposed) -> Tensor",
        tags=(torch.Tag.needs_exact_strides,),
    )
LIB.define("unpack(Tensor bank, Tensor slots, int weight) -> Tensor", tags=(torch.Tag.needs_exact_strides,))
LIB.define("unserved(Tensor ids, str rows) -> Tensor", tags=_TAGS)
LIB.define("observe(Tensor ids, Tensor weight) -> Tensor", tags=_TAGS)
LIB.define("observe_masked(Tensor x, Tensor weight) -> Tensor", tags=_TAGS)
LIB.define("masked_experts(Tensor x, Tensor key) -> Tensor", tags=_TAGS)
LIB.define("experts(Tensor x, Tensor ids, Tensor weights, Tensor key) -> Tensor", tags=_TAGS)
LIB.define("no_gradient(Tensor grad, Tensor input) -> Tensor", tags=_TAGS)


class Layer(Protocol):
    """What a bank may be bound to: one layer of one model, at run time."""

    def fetch(self, ids_P: Tensor) -> Tensor:
        """Start loading the experts that are missing; return the slots they will be in, `[P]`."""

    def place(self, ids_P: Tensor) -> Tensor:
        """`fetch` and `wait` at once, decided by the device: nothing waits, and a CUDA graph can hold it."""

    def place_top(self, scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """torch.topk(scores, k), and then `place` of its ids: values [T, K], ids [T, K] and slots [P]."""

    def place_ahead(self, ids_P: Tensor, slots_Q: Tensor) -> Tensor:
        """`prefetch` by the device: nothing waits, a CUDA graph can hold it, and no slot is taken. Returns a copy of
        `slots_Q`, which are those of the layer before."""

    def wait(self, slots_P: Tensor) -> Tensor:
        """Return the slots that `fetch` named, once every row is in its slot."""

    def stream(self, x_P: Tensor, ids_P: Tensor, core: Core, others: Sequence[Tensor]) -> Tensor:
        """Run `core` for every pair, in waves when they need more experts than there are slots."""

    def masked_experts(self, x_MH: Tensor) -> Tensor:
        """`experts`, of a module that is handed every token for each expert, zeros where the router did not send it."""

    def prefetch(self, ids_P: Tensor) -> None:
        """These experts will probably be asked for soon. Never an error, never a result."""

    def experts(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The whole experts module: what code that the passes never saw falls back to."""


class Observer(Protocol):
    """What a weight may be bound to when routing is only counted."""

    def observe(self, ids_P: Tensor) -> None: ...


class PackedWeight(Protocol):
    """A weight that lies packed in the rows of a bank. Rows are bytes [N]."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def unpack(self, row: Tensor, out: Tensor) -> None:
        """Write one expert's weight into `out`, of its shape and dtype."""

    def multiply(self, x_PI: Tensor, rows_SB: Tensor, runs: Sequence[Run], out_PO: Tensor, transposed: bool) -> None:
        """For each run (slot, begin, end), the product of those x with the weight in that row, or its transpose."""

    def row_codes(self, transposed: bool) -> Any:
        """What the kernels of a device need to know for that product without asking the host; None where they cannot
        compute it."""


class UnservedGraph(RuntimeError):
    """A graph reads offloaded weights, and no pass has put their bank in their place."""


_BOUND: dict[int, tuple[Any, weakref.ref[Tensor]]] = {}  # by address: a server, and what lies there
_CORES: list[Core] = []
_PACKED: list[PackedWeight] = []


def bind(tensor: Tensor, server: Layer | Observer) -> None:
    """Let graphs that are handed `tensor` (a bank, or an observed weight) reach `server`."""
    _BOUND[tensor.data_ptr()] = server, weakref.ref(tensor)


def unbind(tensor: Tensor) -> None:
    _BOUND.pop(tensor.data_ptr(), None)


def register_core(core: Core) -> int:
    """Give `core` the number by which a graph names it. Equal cores of different layers share one."""
    for number, known in enumerate(_CORES):
        if known.key == core.key:
            return number
    _CORES.append(core)
    return len(_CORES) - 1


def register_packed(weight: PackedWeight) -> int:
    """Give a packed weight the number by which a graph names it. Equal ones of different layers share one."""
    if weight not in _PACKED:
        _PACKED.append(weight)
    return _PACKED.index(weight)


def packed_weight(number: int) -> PackedWeight:
    return _PACKED[number]


def is_readable(weight: int, transposed: bool | None) -> bool:
    """Whether a device computes products with that packed weight, or with its transpose; None: unpacks it."""
    ways = (True, False) if transposed is None else (transposed,)
    return any(_PACKED[weight].row_codes(way) is not None for way in ways)


def outputs_of(weight: int, transposed: bool) -> int:
    """How wide a product with that packed weight is."""
    return _PACKED[weight].shape[0 if transposed else 1]


def knows_core(core: Core) -> bool:
    return any(known.key == core.key for known in _CORES)


def _server_of(tensor: Tensor) -> Any:
    server, bound = _BOUND.get(tensor.data_ptr(), (None, None))
    if bound is None or bound() is None:  # memory that was given back may have gone to another tensor
        raise RuntimeError(
            "moe_offload: a rewritten graph was handed a tensor that nothing is bound to; its model was closed, its "
            "weights were replaced after optimize(), or a compiler has copied them"
        )
    return server


def _run_fetch(ids: Tensor, bank: Tensor) -> Tensor:
    slots: Tensor = _server_of(bank).fetch(ids.contiguous())
    return slots


def _run_place(ids: Tensor, bank: Tensor) -> Tensor:
    slots: Tensor = _server_of(bank).place(ids.contiguous())
    return slots.to(torch.int64)  # what the kernels give, whatever the dtype of the ids


def _run_place_top(scores: Tensor, k: int, bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    placed: tuple[Tensor, Tensor, Tensor] = _server_of(bank).place_top(scores, k)
    return placed


def _fake_place_top(scores: Tensor, k: int, bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen = (scores.shape[0], k)
    ids = scores.new_empty(chosen, dtype=torch.int64)
    return scores.new_empty(chosen), ids, ids.new_empty(ids.numel())


def _run_place_ahead(ids: Tensor, slots: Tensor, bank: Tensor) -> Tensor:
    same: Tensor = _server_of(bank).place_ahead(ids.contiguous(), slots.contiguous())
    return same


def _run_gated_mm(x: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    product: Tensor = grouped_mm(x, weight, slots)
    gate, up = product.chunk(2, dim=-1)
    gated: Tensor = torch.nn.functional.silu(gate) * up
    return gated


def _run_wait(slots: Tensor, bank: Tensor) -> Tensor:
    loaded: Tensor = _server_of(bank).wait(slots)
    return loaded


def _run_stream(
    x: Tensor, ids: Tensor, bank: Tensor, others: list[Tensor], core: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    out: Tensor = _server_of(bank).stream(x, ids, _CORES[core], others)
    return out.contiguous()


def _run_stream_masked(x: Tensor, bank: Tensor, core: int, outputs: int, dtype: torch.dtype) -> Tensor:
    return stream_rows(x, outputs, dtype, _CORES[core], _server_of(bank).stream)


def _run_prefetch(ids: Tensor, bank: Tensor) -> None:
    _server_of(bank).prefetch(ids)


def _run_observe(ids: Tensor, weight: Tensor) -> Tensor:
    _server_of(weight).observe(ids)
    return ids.clone()


def _run_observe_masked(x: Tensor, weight: Tensor) -> Tensor:
    _server_of(weight).observe(find_rows(x) // max(x.shape[1], 1))
    return x.clone()


def _run_unserved(ids: Tensor, rows: str) -> Tensor:
    raise UnservedGraph(
        "moe_offload: a graph that our passes have not seen was about to compute with the phantoms of offloaded "
        "experts. Call the model itself, and not a graph that was taken out of it; please report how it was made."
    )


def _run_experts(x: Tensor, ids: Tensor, weights: Tensor, key: Tensor) -> Tensor:
    out: Tensor = _server_of(key).experts(x, ids, weights)
    return out.contiguous()


def _run_masked_experts(x: Tensor, key: Tensor) -> Tensor:
    out: Tensor = _server_of(key).masked_experts(x)
    return out.contiguous()


def run_packed_mm(x: Tensor, bank: Tensor, slots: Tensor, weight: int, transposed: bool) -> Tensor:
    """`packed_mm` by the weight itself: the host is told the slots."""
    packed, rows = _PACKED[weight], bank.view(torch.uint8)
    out = x.new_empty((x.shape[0], outputs_of(weight, transposed)))
    packed.multiply(x, rows, list(find_runs(slots.tolist())), out, transposed)
    return out


def run_packed_gated_mm(x: Tensor, bank: Tensor, slots: Tensor, weight: int, transposed: bool) -> Tensor:
    """`packed_gated_mm` by the product itself, whoever computes it."""
    gate, up = packed_mm(x, bank, slots, weight, transposed).chunk(2, dim=-1)
    gated: Tensor = torch.nn.functional.silu(gate) * up
    return gated


def _run_unpack(bank: Tensor, slots: Tensor, weight: int) -> Tensor:
    packed, rows = _PACKED[weight], bank.view(torch.uint8)
    out = bank.new_empty((len(slots), *packed.shape), dtype=packed.dtype)
    for i, slot in enumerate(slots.tolist()):
        packed.unpack(rows[slot], out[i])
    return out


def serve_no_gradient(refuse: Callable[[], Any]) -> None:
    """`refuse` raises for whoever asks for gradients of `experts`."""
    LIB.impl("no_gradient", lambda grad, input: refuse(), "CompositeExplicitAutograd")


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[2])


def _differentiate_experts(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weights = ctx.saved_tensors
    return no_gradient(grad, x), None, no_gradient(grad, weights), None


def _keep_input(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate_masked(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return no_gradient(grad, *ctx.saved_tensors), None


def serve_product(name: str, kernel: Callable[..., Tensor], dispatch_key: str) -> None:
    """Compute a product, such as `grouped_mm`, by `kernel` on devices of that key.

    Dynamo would trace its body where a compiled core is run by hand, and fail on its loop over groups. (Not so that of
    `stream`: it calls compiled cores.)
    """
    disable: Any = torch._disable_dynamo  # type: ignore[attr-defined]  # lazy, unlike torch.compiler.disable
    LIB.impl(name, disable(kernel), dispatch_key)


for _name, _kernel in {
    "fetch": _run_fetch,
    "place": _run_place,
    "place_top": _run_place_top,
    "place_ahead": _run_place_ahead,
    "gated_mm": _run_gated_mm,
    "packed_gated_mm": run_packed_gated_mm,
    "wait": _run_wait,
    "stream": _run_stream,
    "stream_masked": _run_stream_masked,
    "prefetch": _run_prefetch,
    "observe": _run_observe,
    "observe_masked": _run_observe_masked,
    "unserved": _run_unserved,
    "experts": _run_experts,
    "masked_experts": _run_masked_experts,
}.items():
    LIB.impl(_name, _kernel, "CompositeExplicitAutograd")
for _name in ("grouped_mm", "fast_grouped_mm"):
    serve_product(_name, run_groups, "CompositeExplicitAutograd")
    LIB._register_fake(_name, lambda x, weight, slots: x.new_empty((x.shape[0], weight.shape[2])))
_untraced: Any = torch._disable_dynamo  # type: ignore[attr-defined]
LIB.impl("packed_mm", _untraced(run_packed_mm), "CompositeExplicitAutograd")  # loops, as that of grouped_mm
LIB.impl("unpack", _untraced(_run_unpack), "CompositeExplicitAutograd")
# Dtype and strides of a fake are those of the real result: a compiler reads the buffer by them.
LIB._register_fake("fetch", lambda ids, bank: ids.new_empty(ids.shape))
LIB._register_fake("place", lambda ids, bank: ids.new_empty(ids.shape, dtype=torch.int64))
LIB._register_fake("place_top", _fake_place_top)
LIB._register_fake("place_ahead", lambda ids, slots, bank: slots.new_empty(slots.shape))
LIB._register_fake("gated_mm", lambda x, weight, slots: x.new_empty((x.shape[0], weight.shape[2] // 2)))
LIB._register_fake("wait", lambda slots, bank: torch.empty_like(slots))
LIB._register_fake(
    "stream", lambda x, ids, bank, others, core, shape, dtype: x.new_empty((x.shape[0], *shape), dtype=dtype)
)
LIB._register_fake(
    "stream_masked",
    lambda x, bank, core, outputs, dtype: x.new_empty((*x.shape[:2], outputs), dtype=dtype),
)
LIB._register_fake(
    "packed_mm",
    lambda x, bank, slots, weight, transposed: x.new_empty((x.shape[0], outputs_of(weight, transposed))),
)
LIB._register_fake(
    "packed_gated_mm",
    lambda x, bank, slots, weight, transposed: x.new_empty((x.shape[0], outputs_of(weight, transposed) // 2)),
)
LIB._register_fake(
    "unpack",
    lambda bank, slots, weight: bank.new_empty((slots.shape[0], *_PACKED[weight].shape), dtype=_PACKED[weight].dtype),
)
LIB._register_fake("prefetch", lambda ids, bank: None)
LIB._register_fake("unserved", lambda ids, rows: torch.empty_like(ids))
LIB._register_fake("observe", lambda ids, weight: torch.empty_like(ids))
LIB._register_fake("observe_masked", lambda x, weight: torch.empty_like(x))
LIB._register_fake("masked_experts", lambda x, key: x.new_empty(x.shape))
LIB._register_fake("experts", lambda x, ids, weights, key: x.new_empty(x.shape))

LIB._register_fake("no_gradient", lambda grad, input: torch.empty_like(input))
torch.library.register_autograd(
    "moe_offload::masked_experts", _differentiate_masked, setup_context=_keep_input, lib=LIB
)
torch.library.register_autograd("moe_offload::experts", _differentiate_experts, setup_context=_keep_inputs, lib=LIB)

fetch = torch.ops.moe_offload.fetch.default
place = torch.ops.moe_offload.place.default
place_top = torch.ops.moe_offload.place_top.default
place_ahead = torch.ops.moe_offload.place_ahead.default
wait = torch.ops.moe_offload.wait.default
stream = torch.ops.moe_offload.stream.default
stream_masked = torch.ops.moe_offload.stream_masked.default
prefetch = torch.ops.moe_offload.prefetch.default
grouped_mm = torch.ops.moe_offload.grouped_mm.default
gated_mm = torch.ops.moe_offload.gated_mm.default
fast_grouped_mm = torch.ops.moe_offload.fast_grouped_mm.default
packed_mm = torch.ops.moe_offload.packed_mm.default
packed_gated_mm = torch.ops.moe_offload.packed_gated_mm.default
unpack = torch.ops.moe_offload.unpack.default
unserved = torch.ops.moe_offload.unserved.default
observe = torch.ops.moe_offload.observe.default
observe_masked = torch.ops.moe_offload.observe_masked.default
masked_experts = torch.ops.moe_offload.masked_experts.default
experts = torch.ops.moe_offload.experts.default
no_gradient = torch.ops.moe_offload.no_gradient.default

PLACES = (place, place_top)  # after either the device has decided; the bank is the last argument


def pairs_of(placing: Any) -> int:
    """How many pairs a node asks one of `PLACES` for."""
    value = placing.meta["example_value"]
    pairs: int = (value[2] if placing.target is place_top else value).numel()
    return pairs
