"""Bytes of a model: its dense weights, its KV cache; and the fingerprint that ties a profile to the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..config.settings import OffloadConfig
from ..experts import Field, MoELayer, local_part
from ..observe.profile import Fingerprint
from .budget import Costs, LayerShape

RESERVED_PROMPT_TOKENS = 512  # the automatic reserve has room for the attention scores of so many tokens at a time
#: torch gives cuBLAS 32 MiB on Hopper, 8 before it, out of its own allocator (CublasHandlePool.cpp): once for what runs
#: as it comes, once more in the memory of CUDA graphs (clear_cublass_cache in cudagraph_trees.py). The allocator takes
#: memory from the device 2 MiB at a time: a bank may leave nearly as much unused.
CUBLAS_BYTES, CUDA_BLOCK_BYTES = 2 * 32 << 20, 2 << 20
#: What the driver holds for the recorded decode steps of one model, and torch for what is computed within them: four
#: lengths of a KV cache, of some thousand kernels each. An estimate: no GPU has been asked.
GRAPHS_BYTES = 4 * 16 << 20

AUTO_SCRATCH = 128 * 10**6, 16  # bytes and rows at most, on a CPU
#: The same on a device with its own memory: what its link brings in 5 to 6 ms, so that the link is busy from one
#: layer's last row until the ids of the next layer are known.
AUTO_SCRATCH_BESIDE = 320 * 10**6, 32


def layer_shapes(moe_layers: Sequence[MoELayer]) -> list[LayerShape]:
    return [LayerShape(moe.num_experts, moe.floor, moe.layout.row_bytes) for moe in moe_layers]


def sum_costs(model: Any, moe_layers: Sequence[MoELayer], settings: OffloadConfig, device: str = "cpu") -> Costs:
    """What stands in the budget of `device` besides the banks."""
    row_bytes = max(moe.layout.row_bytes for moe in moe_layers)
    return Costs(
        dense_bytes=dense_bytes(model, moe_layers),
        # On a GPU there is one in use and one that is kept.
        kv_bytes=kv_bytes(model, settings.kv_tokens, settings.kv_sequences) * (2 if device.startswith("cuda") else 1),
        scores_bytes=scores_bytes(model),
        library_bytes=library_bytes(len(moe_layers), device),
        scratch_bytes=scratch_rows(settings, row_bytes, device) * row_bytes,
        unpack_bytes=max((weight.workspace_bytes for moe in moe_layers for weight in moe.packed), default=0),
        reserve_bytes=settings.reserve_bytes,
    )


def scratch_rows(settings: OffloadConfig, row_bytes: int, device: str = "cpu") -> int:
    """How many scratch rows of this size a model gets on `device`."""
    if isinstance(settings.wave_rows, int):
        return settings.wave_rows
    most_bytes, most_rows = AUTO_SCRATCH if device == "cpu" else AUTO_SCRATCH_BESIDE
    return max(4, min(most_rows, most_bytes // row_bytes))


def library_bytes(moe_layers: int, device: str) -> int:
    """Bytes that a device's libraries and recordings hold, and that its allocator may leave unused beside the banks."""
    return CUBLAS_BYTES + GRAPHS_BYTES + moe_layers * CUDA_BLOCK_BYTES if device.startswith("cuda") else 0


def dense_bytes(model: nn.Module, moe_layers: Sequence[MoELayer]) -> int:
    """Bytes of every parameter and buffer that is no expert's; tied ones count once."""
    experts = {id(param) for moe in moe_layers for param in moe.tensors}
    tensors = [*model.parameters(), *model.buffers()]
    return sum(local_part(t).numel() * t.element_size() for t in tensors if id(t) not in experts)


def dense_bytes_on(model: nn.Module, moe_layers: Sequence[MoELayer], device: Callable[[str], str]) -> dict[str, int]:
    """`dense_bytes`, shared out: `device` says where the module of that name computes. Tied tensors count once."""
    seen = {id(param) for moe in moe_layers for param in moe.tensors}
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                name_of_device = device(name)
                found[name_of_device] = (
                    found.get(name_of_device, 0) + local_part(tensor).numel() * tensor.element_size()
                )
    return found


def kv_bytes(model: Any, tokens: int, sequences: int = 1) -> int:
    """Bytes of an ordinary KV cache for so many sequences of `tokens` tokens each.

    For models with a smaller cache (sliding windows, latent attention) this is an upper bound.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None) or 0
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden_size(model) // heads
    longest = longest_context(model) or tokens
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return int(2 * layers * kv_heads * head_dim * min(tokens, longest) * dtype.itemsize * sequences)


def planned_context(model: Any, settings: OffloadConfig) -> int | None:
    """For how many tokens of a prompt and its answer the plan has room in its reserve, in each of `kv_sequences`; None
    where it was told to keep none. A `reserve` of so many bytes has room for what fits into it, and for `kv_tokens` at
    most."""
    tokens, token_bytes = settings.kv_tokens or None, kv_bytes(model, 1, settings.kv_sequences)
    if not settings.reserve_bytes or not token_bytes:
        return tokens
    fitting = max(1, settings.reserve_bytes // token_bytes)
    return fitting if tokens is None else min(tokens, fitting)


def hidden_size(model: Any, moe_layers: Sequence[MoELayer] = ()) -> int:
    """H. A configuration with names of its own may not say: then the width of the embeddings, or of what an expert
    gives; 0 if none is known."""
    said = getattr(model.config.get_text_config(), "hidden_size", None)
    if said:
        return int(said)
    with contextlib.suppress(NotImplementedError, AttributeError):
        return int(model.get_input_embeddings().weight.shape[-1])
    return _down(moe_layers[0]).shape[0] if moe_layers else 0


def longest_context(model: Any) -> int | None:
    """The most tokens that the model was made for, where its configuration says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or None


def scores_bytes(model: Any, tokens: int = RESERVED_PROMPT_TOKENS) -> int:
    """Bytes of the attention scores of one layer over a prompt of `tokens` tokens, where they are held whole.

    Fused attention never does. The plain one (gpt_oss, for its sinks) has them in float32 and twice in the model's own
    dtype at once; measured, they took a 6 GB budget over its limit.
    """
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != "eager":
        return 0
    heads = getattr(config, "num_attention_heads", None) or 1
    longest = longest_context(model) or tokens
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return int(heads * min(tokens, longest) ** 2 * (4 + 2 * dtype.itemsize))


def take_fingerprint(model: Any, moe_layers: Sequence[MoELayer]) -> Fingerprint:
    """What a profile must agree with to be used for `model`."""
    hidden = hidden_size(model, moe_layers)
    down = [_down(moe) for moe in moe_layers]
    return Fingerprint(
        model_type=str(model.config.model_type),
        layers=len(moe_layers),
        experts=[moe.all_experts for moe in moe_layers],
        top_k=[moe.top_k for moe in moe_layers],
        hidden=hidden,
        inner=[math.prod(f.shape) // hidden for f in down],
        dtype=str(down[0].dtype).removeprefix("torch."),
    )


def _down(moe: MoELayer) -> Field:
    """The field whose elements over H are I: the projection down; of experts with names of their own the last matrix,
    which has as many."""
    fields = moe.unpacked.fields
    matrices = [f for f in fields if len(f.shape) > 1] or list(fields)
    return next((f for f in fields if f.name == "down_proj"), matrices[-1])
