"""Which devices this process can compute on, and what memory of theirs is free."""

from __future__ import annotations

import torch


def usable_kinds(untested: bool = True) -> list[str]:
    """The kinds of devices that this process can compute on; without `untested`, those that any version was run on."""
    return ["cpu", "cuda"] if untested and torch.cuda.is_available() else ["cpu"]


def free_bytes(device: str) -> int:
    """Memory of a device that nothing holds yet, what torch keeps for reuse included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def release_unused(device: str) -> None:
    """Give back what torch keeps for reuse: a block that is to be larger than any that is free needs new memory."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
