"""A GPU that is not there: as much of torch.cuda as Inductor asks for while it generates code for one, on a CPU build.

Nothing runs: graphs are traced with fake tensors "on cuda:0", and `generate_code` stops once the code is written. A
process that has entered `pretended` keeps some of it (torch's caches): use a process of its own, `generated_child.py`.

Calls that a CPU build resolves in C++ with a device guard (`x[..., None]`, `copy_`, a literal tensor) fail on fake
tensors of a device it was not built for, so these few are put as the aten ops that they are.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import itertools
import operator
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    L2_cache_size=50 << 20,
)
DEVICE = torch.device("cuda:0")


@dataclass
class Generated:
    """The code of one graph; and, as positions of the graph's inputs, which are mutated and which stay in place."""

    code: str
    mutated: set[int]
    static: set[int]
    partitions: int


class Done(BaseException):
    """The code is written: nothing after it can work without a GPU."""


class Driver:
    """What Triton asks of the active device."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return DEVICE

    def get_current_stream(self, device):
        return 0

    @staticmethod
    def is_active():
        return True


@contextlib.contextmanager
def pretended(monkeypatch):
    """Within it torch believes in an H100."""
    import torch._dynamo.device_interface as interface
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch.utils._triton as triton_facts
    from triton.runtime import driver

    def nothing(*args, **kwargs):
        return None

    cuda = {
        "get_device_properties": lambda *_: H100,
        "_get_device_properties": lambda *_: H100,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: H100.name,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_rng_state": lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8),
        "current_stream": lambda *_: SimpleNamespace(cuda_stream=0, device_index=0),
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        **dict.fromkeys(("init", "_lazy_init", "synchronize", "set_rng_state", "set_device"), nothing),
    }
    built_in = {
        "_cuda_getDevice": lambda: 0,
        "_cuda_getCurrentRawStream": lambda device: 0,
        "_cuda_exchangeDevice": lambda device: 0,
        "_cuda_maybeExchangeDevice": lambda device: 0,
        "_cuda_setDevice": nothing,
    }
    settings = {
        "compile_threads": 1,
        "fx_graph_cache": False,
        "joint_graph_constant_folding": False,
    }  # makes real tensors
    caching = functorch_config.patch(enable_autograd_cache=False)
    with monkeypatch.context() as patch, inductor_config.patch(settings), caching:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value, raising=False)
        for name, value in built_in.items():
            patch.setattr(torch._C, name, value, raising=False)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setitem(interface.caching_worker_device_properties, "cuda", [H100])
        patch.setattr(joint_graph, "lazy_init", nothing)
        patch.setattr(post_grad, "lazy_init", nothing)
        patch.setattr(torch.Tensor, "copy_", lambda self, src, *_, **__: torch.ops.aten.copy_.default(self, src))
        driver.set_active(Driver())
        for fact in vars(triton_facts).values():
            if hasattr(fact, "cache_clear"):
                fact.cache_clear()
        yield


def compile_kernels(code, monkeypatch) -> dict[str, int]:
    """Compile every Triton kernel of generated `code` for an H100: {name: bytes of its machine code}."""
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    made = {}
    with pretended(monkeypatch), monkeypatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
        for name, source in re.findall(
            r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL | re.MULTILINE
        ):
            file = Path(folder) / f"{len(made)}.py"  # Triton reads a kernel's source from its file
            file.write_text(source)
            module: dict[str, Any] = {"__file__": str(file), "__name__": name}
            exec(builtins.compile(source, str(file), "exec"), module)
            kernel = next(one for one in module.values() if hasattr(one, "triton_meta"))
            config, names = kernel.configs[0], kernel.fn.arg_names
            constants = {**kernel.triton_meta.get("constants", {}), **config.kwargs}
            types = {n: "constexpr" if n in constants else kernel.triton_meta["signature"][n] for n in names}
            given = {(names.index(n),): value for n, value in constants.items() if n in names}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            done = compile(ASTSource(kernel.fn, types, given), target=GPUTarget("cuda", 90, 32), options=options)
            made[name] = len(done.asm["cubin"])
    return made


def generate_code(gm, inputs, options, monkeypatch) -> Generated:
    """Inductor's code for `gm` as if it and its `inputs` were on a GPU, with these `options`. Call it in a backend."""
    from torch._guards import TracingContext
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering

    found: dict[str, Any] = {}

    def inner(graph, example_inputs, **kwargs):
        found["static"] = set(kwargs["static_input_idxs"])
        return compile_fx_inner(graph, example_inputs, **kwargs)

    def codegen(self):
        code, _ = write(self)
        names = list(self.graph_input_names)
        mutated = {names.index(name) for name in self.mutated_inputs if name in names}
        found.update(code=getattr(code, "value", code), mutated=mutated, partitions=len(self.partition_maps or ()))
        raise Done

    moved, fake_mode = _moved(gm), TracingContext.get().fake_mode
    with pretended(monkeypatch), monkeypatch.context() as patch:
        write = GraphLowering.codegen
        patch.setattr(GraphLowering, "codegen", codegen)
        with contextlib.suppress(Done), fake_mode:
            fakes = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE) if torch.is_tensor(x) else x
                for x in inputs
            ]
            compile_fx(moved, fakes, inner_compile=inner, config_patches=options)
    return Generated(**found)


def _moved(gm):
    """A copy of the graph, on the device, without what a CPU build cannot do there."""
    moved = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
    moved.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):  # by these AOTAutograd finds the inputs that stay where they are
        moved._param_name_to_source = gm._param_name_to_source
        for node, original in zip(moved.graph.nodes, gm.graph.nodes, strict=True):
            if node.op == "placeholder":
                node._dynamo_source = original._dynamo_source
    put = {
        operator.getitem: _get,
        operator.setitem: _set,
        operator.invert: torch.ops.aten.bitwise_not.default,
        torch.tensor: _literal,
        torch._C._nn.scaled_dot_product_attention: _attention,
    }
    for node in moved.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, _on_device)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _on_device)
        node.target = put.get(node.target, node.target)
        if node.op == "call_method" and node.target == "roll":
            node.op, node.target = "call_function", _roll
    moved.recompile()
    return moved


def _on_device(x):
    return DEVICE if x == "cpu" or (isinstance(x, torch.device) and x.type == "cpu") else x


def _get(x, index):
    if not torch.is_tensor(x):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    given = sum(i is not None and i is not Ellipsis for i in index)
    if not any(i is Ellipsis for i in index):
        index = (*index, Ellipsis)
    whole = [slice(None)] * (x.dim() - given)
    at, tensors = 0, {}
    for i in itertools.chain.from_iterable(whole if one is Ellipsis else [one] for one in index):
        if i is None:
            x = torch.ops.aten.unsqueeze.default(x, at)
        elif isinstance(i, int):
            x = torch.ops.aten.select.int(x, at, i)
            continue
        elif torch.is_tensor(i):
            tensors[at] = i
        elif i != slice(None):
            x = torch.ops.aten.slice.Tensor(x, at, i.start, i.stop, i.step or 1)
        at += 1
    return torch.ops.aten.index.Tensor(x, [tensors.get(d) for d in range(max(tensors) + 1)]) if tensors else x


def _set(x, index, value):
    index = index if isinstance(index, tuple) else (index,)
    if torch.is_tensor(index[-1]) and all(i == slice(None) for i in index[:-1]):
        torch.ops.aten.index_put_.default(x, [*[None] * (len(index) - 1), index[-1]], value)
    else:
        _get(x, index).copy_(value)


def _roll(x, shift, dims):
    size, dim = x.shape[dims], dims % x.dim()
    cut = size - shift % size
    parts = (torch.ops.aten.slice.Tensor(x, dim, *span, 1) for span in ((cut, size), (0, cut)))
    return torch.ops.aten.cat.default(list(parts), dim)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What CUDA chooses where there is a mask: a CPU build would write out the scores."""
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = (torch.ops.aten.repeat_interleave.self_int(x, group, 1) for x in (key, value))
    bias = attn_mask
    if bias is not None:
        bias = torch.ops.aten.expand.default(bias, [*query.shape[:3], key.shape[2]])
    if bias is not None and bias.dtype == torch.bool:
        lowest = torch.ops.aten.full.default([], float("-inf"), dtype=query.dtype, device=DEVICE)
        zero = torch.ops.aten.full.default([], 0.0, dtype=query.dtype, device=DEVICE)
        bias = torch.ops.aten.where.self(bias, zero, lowest)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention.default
    return attend(query, key, value, bias, False, dropout_p, is_causal, scale=scale)[0]


def _literal(data, dtype=None, device=None):
    """`torch.tensor` of one whole number, which fake tensors of an absent device cannot hold."""
    number = int(data[0] if isinstance(data, list) else data)
    x = torch.arange(number, number + 1, dtype=dtype or torch.int64, device=device)
    return x if isinstance(data, list) else torch.ops.aten.select.int(x, 0, 0)
