"""Host memory that a GPU reads by itself: registered in place, in pieces, as far as the system allows.

`Tensor.pin_memory()` would copy, and round every size up to a power of two. Registering needs no copy; what cannot be
registered stays as it is, and is copied by the driver through memory of its own: slower, never wrong.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..sizes import format_size

logger = logging.getLogger("moe_offload")
PIECE_BYTES = 1 << 30  # registered at a time: a limit is met after most of it, not before all of it
PORTABLE_MAPPED = 1 | 2  # for every context, and with an address on the device
_warned = False


def pin(buffer: Tensor) -> Tensor:
    """Register `buffer` (contiguous, on the CPU); returns it, pinned as far as possible. Warns once where it is not."""
    global _warned
    whole = buffer.view(torch.uint8).flatten()
    for at in range(0, whole.numel(), PIECE_BYTES):
        size = min(PIECE_BYTES, whole.numel() - at)
        error = _register(whole.data_ptr() + at, size)
        if error:
            if not _warned:
                _warned = True
                logger.warning(
                    "CUDA could pin %s of %s of host memory and no more (%s): the rest is copied more slowly, and the "
                    "host decides which experts are in the slots. Raise the memlock limit (ulimit -l), or free RAM",
                    format_size(at), format_size(whole.numel()), error,
                )  # fmt: skip
            break
    return buffer


def unpin(buffer: Tensor) -> None:
    whole = buffer.view(torch.uint8).flatten()
    cudart: Any = torch.cuda.cudart()
    for at in range(0, whole.numel(), PIECE_BYTES):
        if int(cudart.cudaHostUnregister(whole.data_ptr() + at)):
            drain()
            return


def device_view(buffer: Tensor, device: torch.device) -> Tensor | None:
    """`buffer` as the device sees it, nothing copied; None if it is not all pinned. Keep `buffer` alive beside it."""
    if not buffer.is_pinned():
        return None
    storage = torch._C._construct_storage_from_data_pointer(
        buffer.data_ptr(), device, buffer.numel() * buffer.element_size()
    )
    empty = torch.empty(0, dtype=buffer.dtype, device=device)
    return empty.set_(storage, 0, buffer.shape, buffer.stride())


def drain() -> None:
    """Clear the last error of the runtime: it would come up again at somebody else's next call."""
    getattr(torch.cuda.cudart(), "cudaGetLastError", lambda: None)()


def _register(pointer: int, nbytes: int) -> str:
    """'' or what went wrong."""
    cudart: Any = torch.cuda.cudart()
    code = cudart.cudaHostRegister(pointer, nbytes, PORTABLE_MAPPED)
    if int(code) == 0:
        return ""
    drain()
    return str(getattr(cudart, "cudaGetErrorString", str)(code))
