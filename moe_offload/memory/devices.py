"""Which devices this process can compute on, and what memory of theirs is free."""

from __future__ import annotations

import torch


def usable_kinds(untested: bool = True) -> list[str]:
    """The kinds of devices that this process can compute on; without `untested`, those that any version was run on."""
    return ["cpu", "cuda"] if untested and torch.cuda.is_available() else ["cpu"]


def free_bytes(device: str) -> int:
    """Memory of a device that nothing holds yet, what torch keeps for reuse included; but not what it keeps in the
    pools of CUDA graphs, which nothing else is given."""
    free, _ = torch.cuda.mem_get_info(device)
    index, whole = torch.device(device).index or 0, (0, 0)
    kept = [
        one
        for one in torch.cuda.memory_snapshot()
        if one["device"] == index and tuple(one.get("segment_pool_id", whole)) == whole
    ]
    return int(free) + sum(int(one["total_size"] - one["allocated_size"]) for one in kept)


def release_unused(device: str) -> None:
    """Give back what torch keeps for reuse: a block that is to be larger than any that is free needs new memory."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
