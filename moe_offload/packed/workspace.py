"""Where a weight is unpacked that is used at once and not kept: one piece of memory of each thread, used again.

Fresh memory would have to be given out by the system page by page, which takes longer than to fill it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _Workspace(threading.local):
    memory = torch.empty(0, dtype=torch.uint8)


_own = _Workspace()


def borrow(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of that shape, until this thread borrows again."""
    nbytes = math.prod(shape) * dtype.itemsize
    if _own.memory.numel() < nbytes:
        _own.memory = torch.empty(0, dtype=torch.uint8)  # before the larger piece is asked for
        _own.memory = torch.empty(nbytes, dtype=torch.uint8)
    return _own.memory[:nbytes].view(dtype).view(*shape)


def give_back() -> None:
    """Free what this thread has borrowed so far."""
    _own.memory = torch.empty(0, dtype=torch.uint8)
