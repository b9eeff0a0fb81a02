"""Many copies by one call of the CUDA runtime (`cudaMemcpyBatchAsync`, from CUDA 12.8 on).

A copy that torch launches costs the host tens of microseconds of Python, and a prompt copies hundreds of rows. torch
has no call for it, so the runtime that torch itself has loaded is asked, and no other. The call is not the same in
every version:

    12.8, 12.9   (targets, sources, sizes, count, attributes, first of each, attributes' count, failed index, stream)
    13.x         the same without the failed index

Any other version counts as one without it. The first batch of a device is small and looked at, so that a call which
does something else is never trusted with rows.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import OffloadError

logger = logging.getLogger("moe_offload")

NAME = "cudaMemcpyBatchAsync"
FROM = 12080  # CUDA 12.8
WITH_FAILED_INDEX = {12: True, 13: False}  # by the major version
SOURCE_IN_STREAM_ORDER = 1
NO_INDEX = ctypes.c_size_t(-1).value
DEFAULT_STREAMS = (0, 1)  # no stream, and the legacy one: both are refused by the runtime


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes: the hints are for managed memory, and ours is not."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


class BatchCopy:
    """`copy` launches many copies on one stream. `library` is the CUDA runtime, whose version it is made for."""

    def __init__(self, library: Any, version: int):
        self._library, self._has_failed_index = library, WITH_FAILED_INDEX[version // 1000]
        pointers, sizes = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t)
        failed = [sizes] if self._has_failed_index else []
        attributes = ctypes.POINTER(_Attributes)
        count = ctypes.c_size_t
        self._call: Any = getattr(library, NAME)
        self._call.restype = ctypes.c_int
        self._call.argtypes = [
            *(pointers, pointers, sizes, count, attributes, sizes, count), *failed, ctypes.c_void_p,
        ]  # fmt: skip

    def copy(self, copies: Sequence[tuple[int, int, int]], stream: int) -> None:
        """Launch all `copies` (address of the target, of the source, bytes), which do not overlap, on `stream`.

        Raises `OffloadError`, with what the runtime says, if it refuses them.
        """
        if stream in DEFAULT_STREAMS:
            raise AssertionError(f"{NAME} cannot launch on a default stream")
        code, failed = self._launch(copies, stream)
        if code:
            which = f" of copy {failed}," if failed != NO_INDEX else ""
            raise OffloadError(
                f"{NAME} has refused {len(copies)} copies of rows to the device:{which} {self._say(code)}. Please "
                "report it with the versions of torch and of the driver"
            )

    def try_out(self, device: torch.device, stream: torch.cuda.Stream) -> str:
        """'' if it copies what it is told to; else why the driver does not. Raises `OffloadError` if it copies anything
        else."""
        source = torch.arange(64, dtype=torch.int64, device="cpu").view(4, 16).pin_memory()
        with torch.cuda.stream(stream):
            target = torch.full((4, 16), -1, dtype=torch.int64, device=device)
            pairs = [(target[i].data_ptr(), source[3 - i].data_ptr(), 120) for i in range(3)]
            code, _ = self._launch(pairs, stream.cuda_stream)
            found = target.cpu()
        if code:
            return self._say(code)
        want = torch.full_like(found, -1)
        want[:3, :15] = source[[3, 2, 1], :15]
        if not torch.equal(found, want):
            raise OffloadError(
                f"{NAME} of this CUDA runtime copies something else than it is told to; please report it with the "
                "versions of torch and of the driver"
            )
        return ""

    def _launch(self, copies: Sequence[tuple[int, int, int]], stream: int) -> tuple[int, int]:
        """The runtime's answer, and which copy it is about."""
        count = len(copies)
        targets, sources, sizes = zip(*copies, strict=True)
        attributes, first, failed = _Attributes(SOURCE_IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(NO_INDEX)
        code = self._call(
            (ctypes.c_void_p * count)(*targets),
            (ctypes.c_void_p * count)(*sources),
            (ctypes.c_size_t * count)(*sizes),
            count,
            ctypes.byref(attributes),
            ctypes.byref(first),
            1,
            *([ctypes.byref(failed)] if self._has_failed_index else []),
            stream,
        )
        return int(code), failed.value

    def _say(self, code: int) -> str:
        words = []
        for what in ("cudaGetErrorName", "cudaGetErrorString"):
            function = getattr(self._library, what)
            function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_int]
            words.append((function(code) or b"?").decode())
        self._library.cudaGetLastError()  # else it is raised again at the next launch
        return f"{words[0]} ({code}), {words[1]}"


def find_batch_copy(library: Any = None) -> BatchCopy | None:
    """That of the CUDA runtime which torch has loaded (or of `library`); None where it has none that is known."""
    library = _loaded_runtime() if library is None else library
    if library is None or not hasattr(library, NAME):
        return None
    version = ctypes.c_int()
    if library.cudaRuntimeGetVersion(ctypes.byref(version)):
        return None
    known = version.value >= FROM and version.value // 1000 in WITH_FAILED_INDEX
    return BatchCopy(library, version.value) if known else None


def _loaded_runtime() -> Any:
    """None where torch has none, or has linked it into itself."""
    version = str(torch.version.cuda or "")
    if not version or not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        return ctypes.CDLL(f"libcudart.so.{version.partition('.')[0]}", mode=os.RTLD_NOLOAD)
    except OSError:
        return None
