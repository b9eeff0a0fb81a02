"""Memory that no tensor holds: what the C heap and the kernel library keep for themselves, outside every budget."""

from __future__ import annotations

import contextlib
import ctypes
import os

KEPT_KERNELS = 128


def trim_heap() -> None:
    """Hand free heap memory back to the system (glibc; elsewhere nothing happens).

    The activations of a prompt are tens of MB each, of a new size every time. The heap keeps what they leave behind in
    pieces: measured, 100 to 180 MB that no budget knows of, for 512 tokens of gpt-oss. It takes a few ms.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def bound_kernel_caches() -> None:
    """Let oneDNN, and torch's layer over it, keep 128 compiled kernels each, not 1024; a user's setting stays.

    They keep one per shape, 0.65 MB, and in a prompt each expert multiplies a number of rows of its own: gpt-oss in
    bfloat16 on a CPU with AMX grew by 230 MB with the first prompt and 340 MB with four, beside its budget; with these
    bounds it stops growing after the first. Paired runs of 128 and 1024 took the same time, 64 perhaps more. (To
    compute a few rows more instead, so that there are fewer shapes, changed results there by a rounding.)

    The variables are read when the first kernel is compiled: where something else in the process came first, nothing
    changes.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KEPT_KERNELS))
