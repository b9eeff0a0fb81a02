"""Host memory that a GPU reads by itself: registered in place, in pieces, as far as the system allows.

`Tensor.pin_memory()` would copy, and round every size up to a power of two. Registering needs no copy; what cannot be
registered stays as it is, and is copied by the driver through memory of its own: slower, never wrong.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sizes import format_size

logger = logging.getLogger("moe_offload")
PIECE_BYTES = 1 << 30  # registered at a time: a limit is met after most of it, not before all of it
PORTABLE_MAPPED = 1 | 2  # for every context, and with an address on the device
_warned = False
_process = 0  # that registered: one that was forked from it has neither the registrations nor CUDA


def pin(rows: Sequence[Tensor]) -> bool:
    """Register each of `rows` (uint8 [E, row_bytes], contiguous, page-aligned), whole rows at a time; say whether all
    are.

    Warns once where the system allows no more. What was registered stays so until `unpin`.
    """
    global _warned, _process
    _process, done = os.getpid(), 0
    for piece in _pieces(rows):
        error = _register(piece)
        if error:
            if not _warned:
                _warned = True
                logger.warning(
                    "CUDA could pin %s of %s of host memory and no more (%s): the rest is copied more slowly, and the "
                    "host decides which experts are in the slots. Raise the memlock limit (ulimit -l), or free RAM",
                    format_size(done), format_size(sum(layer.nbytes for layer in rows)), error,
                )  # fmt: skip
            return False
        done += piece.nbytes
    return True


def unpin(rows: Sequence[Tensor]) -> None:
    """Undo `pin`, as far as it came, or was ever called. Nothing may be copying from there any more."""
    if os.getpid() != _process:
        return
    cudart: Any = torch.cuda.cudart()
    codes = [int(cudart.cudaHostUnregister(piece.data_ptr())) for piece in _pieces(rows)]
    if any(codes):  # those that never were registered
        drain()


def device_view(rows: Tensor, device: str) -> Tensor:
    """`rows`, all pinned, as the device sees them, nothing copied. Keep `rows` alive beside the view."""
    storage = torch._C._construct_storage_from_data_pointer(rows.data_ptr(), torch.device(device), rows.nbytes)
    return torch.empty(0, dtype=rows.dtype, device=device).set_(storage, 0, rows.shape, rows.stride())


def _pieces(rows: Sequence[Tensor]) -> Iterator[Tensor]:
    for layer in rows:
        yield from layer.split(max(1, PIECE_BYTES // max(layer.shape[1], 1)))


def drain() -> None:
    """Clear the last error of the runtime: it would come up again after somebody else's next kernel."""
    _runtime().cudaGetLastError()


@functools.cache
def _runtime() -> Any:
    """The CUDA runtime that torch has loaded. Its own binding (`torch.cuda.cudart()`) has no cudaGetLastError."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10_cuda.so"))


def _register(piece: Tensor) -> str:
    """'' or what went wrong."""
    cudart: Any = torch.cuda.cudart()
    code = cudart.cudaHostRegister(piece.data_ptr(), piece.nbytes, PORTABLE_MAPPED)
    if int(code) == 0:
        return ""
    drain()
    return str(cudart.cudaGetErrorString(code))
