"""The host store gives its memory back once, after what a GPU was told of it has been undone."""

from __future__ import annotations

import torch

from moe_offload.memory.stores.host import HostStore


def test_what_was_pinned_is_released_once() -> None:
    released: list[int] = []
    store = HostStore([torch.zeros(2, 64, dtype=torch.uint8)], release=lambda: released.append(1))
    store.close()
    store.close()
    assert released == [1]
