"""How each side of the comparison loads the model on a CPU. Each runs in a process of its own (`side.py`).

resident     transformers' own from_pretrained: the whole model in memory
ours         moe_offload.from_pretrained inside the budget; of a packed copy where one was written
accelerate   device_map="auto" with max_memory={"cpu": budget} and an offload folder: whole layers come from disk
mmap         dense weights in memory, the experts' stacked parameters mapped from a file: the kernel decides
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ....checkpoint.outline import outline_folder
from ....checkpoint.pretrained.arguments import Arguments
from ....checkpoint.pretrained.dense import load_dense, load_whole
from ....checkpoint.pretrained.own_class import is_own
from ....checkpoint.row_index import RowIndex
from ....config.settings import resolve_settings
from ....config.usage import measured_with
from ....experts import MoELayer, find_experts
from ....files.system import forget_cached
from ....memory.stores.disk import DiskStore


@dataclass(frozen=True)
class Job:
    """What a side is to load: a checkpoint `folder`, inside `budget` bytes, for requests of `tokens` tokens."""

    folder: Path
    budget: int
    scratch: Path
    tokens: int
    trust_remote_code: bool = False

    @property
    def arguments(self) -> Arguments:
        return Arguments(trust_remote_code=self.trust_remote_code)

    @property
    def code(self) -> dict[str, Any]:
        """What transformers is told of it, where it is to be told anything."""
        return {"trust_remote_code": True} if self.trust_remote_code else {}


@dataclass(frozen=True)
class Contender:
    """How a side loads its model, and what it gives `generate` beside the request."""

    load: Callable[[Job], Any]
    options: Mapping[str, Any] = field(default_factory=dict)


def room_for(tokens: int) -> dict[str, Any]:
    """What ours is told, so that its budget has room for a KV cache of so many tokens, never less than by default; and
    so that no run depends on those before it."""
    wanted = resolve_settings()
    return {"kv_tokens": max(wanted.kv_tokens, tokens), "profile": measured_with(wanted.profile)}


def load_resident(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    found = outline_folder(job.folder, job.arguments) if job.trust_remote_code else None
    if found is not None and is_own(found.model):  # transformers' own loader leaves out what its __init__ computes
        return load_whole(found)
    return AutoModelForCausalLM.from_pretrained(job.folder, dtype="auto", **job.code).eval()


def load_ours(job: Job) -> Any:
    from ....api import from_pretrained

    packed = job.scratch / PACKED
    folder = packed if packed.exists() else job.folder
    return from_pretrained(folder, job.budget, config=room_for(job.tokens), **job.code)


def load_accelerate(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        job.folder,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": job.budget},
        offload_folder=str(job.scratch / "accelerate"),
        **job.code,
    ).eval()


def load_mapped(job: Job) -> Any:
    model: Any = load_dense(outline_folder(job.folder, job.arguments), job.arguments)
    for moe in find_experts(model):
        stacks = {}
        for name, shape, dtype, file in _fields(moe, job.scratch / "mmap"):
            size = torch.Size(shape).numel()
            stacks[name] = torch.from_file(str(file), shared=False, size=size, dtype=dtype).view(shape)
        for place in (place for places in moe.places for place in places):
            stack = stacks[place.field]
            mapped = stack if place.expert is None else stack[place.expert]
            place.module._parameters[place.attribute] = nn.Parameter(_cut(mapped, place.tensor), requires_grad=False)
    return model.eval()


def _cut(mapped: Tensor, like: Tensor) -> Tensor:
    """Some stacks have no share for the last experts, which are identities; and in some the shares are joined."""
    return mapped.flatten()[: like.numel()].view(like.shape)


PACKED = "packed"
CPU_SIDES = {
    "resident": Contender(load_resident),
    "ours": Contender(load_ours),
    "accelerate": Contender(load_accelerate),
    "mmap": Contender(load_mapped),
}


def write_mapped(folder: Path, scratch: Path, trust_remote_code: bool = False) -> None:
    """The files that `load_mapped` maps: one for each weight of all experts of a layer. A row in memory at a time."""
    target = scratch / "mmap"
    target.mkdir(parents=True, exist_ok=True)
    found = outline_folder(folder, Arguments(trust_remote_code=trust_remote_code))
    moe_layers, index = found.moe_layers, cast(RowIndex, found.index)
    store = DiskStore([moe.layout for moe in moe_layers], index)
    with contextlib.closing(store):
        for moe in moe_layers:
            row = torch.empty(moe.layout.row_bytes, dtype=torch.uint8)
            with contextlib.ExitStack() as files:
                streams = [files.enter_context(file.open("wb")) for *_, file in _fields(moe, target)]
                for e in range(moe.num_experts):
                    store.read(moe.index, e, memoryview(row.numpy()))
                    for field, stream in zip(moe.layout.fields, streams, strict=True):
                        stream.write(row[field.offset : field.offset + field.nbytes].numpy())
                for stream in streams:
                    stream.flush()
                    os.fsync(stream.fileno())


def drop_cache(*folders: Path) -> None:
    """Drop these files from the page cache: pages that one side has read must not serve another."""
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            forget_cached(opened.fileno())


def _fields(moe: MoELayer, folder: Path) -> list[tuple[str, tuple[int, ...], torch.dtype, Path]]:
    """Name, stacked shape, dtype and file of each parameter of a layer."""
    return [
        (field.name, (moe.num_experts, *field.shape), field.dtype, folder / f"{moe.index}.{field.name}")
        for field in moe.layout.fields
    ]
