"""Host memory that a GPU reads by itself: registered in place, in pieces, as far as the system allows.

`Tensor.pin_memory()` would copy, and round every size up to a power of two. Registering needs no copy; what cannot be
registered stays as it is, and is copied by the driver through memory of its own: slower, never wrong.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor

from ..sizes import format_size

logger = logging.getLogger("moe_offload")
PIECE_BYTES = 1 << 30  # registered at a time: a limit is met after most of it, not before all of it
PORTABLE_MAPPED = 1 | 2  # for every context, and with an address on the device
_warned = False


def pin(rows: Tensor) -> bool:
    """Register `rows` (uint8 [E, row_bytes], contiguous, page-aligned), whole rows at a time; say whether all are.

    Warns once where the system allows no more. What was registered stays so until `unpin`.
    """
    global _warned
    for piece in _pieces(rows):
        error = _register(piece)
        if error:
            if not _warned:
                _warned = True
                done = piece.data_ptr() - rows.data_ptr()
                logger.warning(
                    "CUDA could pin %s of %s of host memory and no more (%s): the rest is copied more slowly, and the "
                    "host decides which experts are in the slots. Raise the memlock limit (ulimit -l), or free RAM",
                    format_size(done), format_size(rows.nbytes), error,
                )  # fmt: skip
            return False
    return True


def unpin(rows: Tensor) -> None:
    """Undo `pin`, as far as it came. Nothing may be copying from there any more."""
    cudart: Any = torch.cuda.cudart()
    for piece in _pieces(rows):
        if int(cudart.cudaHostUnregister(piece.data_ptr())):
            drain()
            return


def device_view(rows: Tensor, device: str) -> Tensor:
    """`rows`, all pinned, as the device sees them, nothing copied. Keep `rows` alive beside the view."""
    storage = torch._C._construct_storage_from_data_pointer(rows.data_ptr(), torch.device(device), rows.nbytes)
    return torch.empty(0, dtype=rows.dtype, device=device).set_(storage, 0, rows.shape, rows.stride())


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = rows.split(max(1, PIECE_BYTES // max(rows.shape[1], 1)))
    return pieces


def drain() -> None:
    """Clear the last error of the runtime: it would come up again at somebody else's next launch.

    torch gives no other way to it than a launch of our own, after which it looks.
    """
    with contextlib.suppress(RuntimeError):
        torch.full((1,), 1, device="cuda")


def _register(piece: Tensor) -> str:
    """'' or what went wrong."""
    cudart: Any = torch.cuda.cudart()
    code = cudart.cudaHostRegister(piece.data_ptr(), piece.nbytes, PORTABLE_MAPPED)
    if int(code) == 0:
        return ""
    drain()
    return str(cudart.cudaGetErrorString(code))
