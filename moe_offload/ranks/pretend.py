"""Plan for a rank that is not there: what it would hold, before any process is started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # whose import makes "fake" a backend

from ..errors import ConfigError


@contextlib.contextmanager
def pretended_rank(rank: int, world: int) -> Iterator[None]:
    """Inside, this process counts as `rank` of `world`, for models on the meta device: nothing is exchanged.

    Raises `ConfigError` in a process that has a group already.
    """
    if dist.is_initialized():
        raise ConfigError(
            f"a plan for {world} ranks is made in one process, and this one is already rank {dist.get_rank()} of "
            f"{dist.get_world_size()}; ask for it before the model is loaded"
        )
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
