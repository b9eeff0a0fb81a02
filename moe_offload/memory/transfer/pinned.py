"""Host memory that a GPU reads by itself: registered in place, in pieces, as far as the system allows.

`Tensor.pin_memory()` would copy, and round every size up to a power of two. Registering needs no copy; what cannot be
registered stays as it is, and is copied by the driver through memory of its own: slower, never wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...config.sizes import format_size

logger = logging.getLogger("moe_offload")
PIECE_BYTES = 1 << 30  # registered at a time, so that under a limit most of the rows are still pinned
PORTABLE_MAPPED = 1 | 2  # flags of cudaHostRegister: for every CUDA context, and with an address on the device
_process = 0  # pid of the process that registered; one forked from it has neither the registrations nor CUDA


def pin_layers(rows_EN: Mapping[int, Tensor], device: str) -> frozenset[int]:
    """Pin the rows of each layer, for `device`; return the layers whose rows all are. Warns once of those that are not.

    Other layers may be pinned in part: what of it was registered stays so until `unpin`, and is copied faster.
    """
    with torch.cuda.device(device):
        errors = {layer: pin_rows(rows) or _not_readable(rows) for layer, rows in rows_EN.items()}
    refused = [layer for layer, error in errors.items() if error]
    if refused:
        size = format_size(sum(rows_EN[layer].nbytes for layer in refused))
        logger.warning(
            "CUDA could pin the rows of %d of %d layers in RAM (%s): the other %s are copied more slowly, and there "
            "the host decides which experts are in the slots. Free RAM, or raise the memory limit of the container "
            "(and of locked memory, ulimit -l, where the driver counts it)",
            len(errors) - len(refused), len(errors), errors[refused[0]], size,
        )  # fmt: skip
    return frozenset(errors) - frozenset(refused)


def unpin_layers(rows_EN: Mapping[int, Tensor], device: str) -> None:
    """Undo `pin_layers`. Nothing may be copying from there any more."""
    if os.getpid() == _process:
        with torch.cuda.device(device), contextlib.ExitStack() as each:  # whatever happens to the others
            for rows in rows_EN.values():
                each.callback(unpin_rows, rows)


def pin_rows(rows: Tensor) -> str:
    """Register `rows` (uint8 [E, row_bytes], contiguous, page-aligned), whole rows at a time; '' or what went wrong.

    What was registered stays so until `unpin`.
    """
    return next((error for piece in _pieces(rows) if (error := _register(piece))), "")


def unpin_rows(rows: Tensor) -> None:
    """Undo `pin`, as far as it came, or was called at all. Nothing may be copying from there any more."""
    if os.getpid() != _process:
        return
    cudart: Any = torch.cuda.cudart()
    codes = [int(cudart.cudaHostUnregister(piece.data_ptr())) for piece in _pieces(rows)]
    if any(codes):  # a piece was not registered, which set CUDA's last error
        clear_last_error()


def device_address(host_address: int) -> int | None:
    """Where the current device sees that host memory, by the driver; None where it does not."""
    address = ctypes.c_uint64()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    code = driver.cuMemHostGetDevicePointer_v2(ctypes.byref(address), ctypes.c_void_p(host_address), 0)
    return None if code else address.value


def _not_readable(rows: Tensor) -> str:
    """'' if the device sees all of the pinned `rows` where the host does, as kernels and `device_view` need; else what
    is wrong. It is so on Linux, but not under every hypervisor."""
    if all(device_address(piece.data_ptr()) == piece.data_ptr() for piece in _pieces(rows) if piece.nbytes):
        return ""
    return "the device sees them at other addresses than the host, or not at all"


def device_view(rows: Tensor, device: str) -> Tensor:
    """`rows`, all of them in a layer that `pin_layers` returned, as the device sees them, nothing copied. Keep `rows`
    alive beside the view."""
    storage = torch._C._construct_storage_from_data_pointer(rows.data_ptr(), torch.device(device), rows.nbytes)
    return torch.empty(0, dtype=rows.dtype, device=device).set_(storage, 0, rows.shape, rows.stride())


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = rows.split(max(1, PIECE_BYTES // max(rows.shape[1], 1)))
    return pieces


def clear_last_error() -> None:
    """Clear CUDA's last error: it would be raised again at the next launch, which has nothing to do with it.

    torch offers no call for that, but asks CUDA for the error after each launch: so one is made here, for nothing else.
    """
    with contextlib.suppress(RuntimeError):
        torch.full((1,), 1, device="cuda")


def _register(piece: Tensor) -> str:
    """'' or what went wrong."""
    global _process
    _process = os.getpid()
    cudart: Any = torch.cuda.cudart()
    code = cudart.cudaHostRegister(piece.data_ptr(), piece.nbytes, PORTABLE_MAPPED)
    if int(code) == 0:
        return ""
    clear_last_error()
    return str(cudart.cudaGetErrorString(code))
