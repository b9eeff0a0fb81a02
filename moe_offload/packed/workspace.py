"""The memory that a weight is unpacked into for one product: one piece for each thread, which the next weight reuses.

Fresh memory would take longer to get from the system, page by page, than to fill.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


class _Piece:
    """What one thread has borrowed so far; gone with its thread."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device="cpu")


class _Own(threading.local):
    """Its `__init__` runs in each thread that comes here."""

    def __init__(self) -> None:
        self.piece, number = _Piece(), next(_numbers)
        _pieces[number] = weakref.ref(self.piece, lambda _: _pieces.pop(number, None))


_numbers = itertools.count()
_pieces: dict[int, weakref.ref[_Piece]] = {}  # of all threads; no lock, which a forked child might find taken
_own = _Own()


def borrow_workspace(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of that shape, valid until this thread borrows again."""
    nbytes, piece = math.prod(shape) * dtype.itemsize, _own.piece
    memory = piece.memory  # kept here: another thread may give it back at any moment
    if memory.numel() < nbytes:
        del memory
        piece.memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # before the larger piece is asked for
        memory = piece.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return memory[:nbytes].view(dtype).view(*shape)


def free_workspace() -> None:
    """Free what threads have borrowed so far, each piece as soon as its thread has done with it."""
    for found in list(_pieces.values()):
        piece = found()
        if piece is not None:
            piece.memory = torch.empty(0, dtype=torch.uint8, device="cpu")
