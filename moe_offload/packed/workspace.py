"""The memory that a weight is unpacked into for one product: one piece for each thread, which the next weight reuses.

Fresh memory would take longer to get from the system, page by page, than to fill.
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


def borrow_workspace(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of that shape, valid until this thread borrows again."""
    nbytes = math.prod(shape) * dtype.itemsize
    if _own.memory.numel() < nbytes:
        _own.memory = torch.empty(0, dtype=torch.uint8)  # before the larger piece is asked for
        _own.memory = torch.empty(nbytes, dtype=torch.uint8)
    return _own.memory[:nbytes].view(dtype).view(*shape)


def free_workspace() -> None:
    """Free what this thread has borrowed so far."""
    _own.memory = torch.empty(0, dtype=torch.uint8)
