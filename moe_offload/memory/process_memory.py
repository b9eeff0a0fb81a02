"""Memory that no tensor holds and no budget counts: what the C heap and oneDNN's cache of kernels keep."""

from __future__ import annotations

import contextlib
import ctypes
import os

KERNEL_BYTES = 650_000
KERNEL_SHARE = 8  # oneDNN's kernels may take an eighth of a budget, but are never fewer or more than these two
FEWEST_KERNELS, MOST_KERNELS = 16, 128
SET_BY = "_MOE_OFFLOAD_KERNELS"  # "<process>:<kernels>"


def trim_heap() -> None:
    """Hand free heap memory back to the system (glibc; elsewhere nothing happens).

    The activations of a prompt are tens of MB each, of a new size every time. The heap keeps what they leave behind in
    pieces: measured, 100 to 180 MB that no budget knows of, for 512 tokens of gpt-oss. It takes a few ms.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def kept_kernels(budget: int) -> int:
    """How many compiled kernels a process keeps whose model has `budget` bytes."""
    return max(FEWEST_KERNELS, min(MOST_KERNELS, budget // KERNEL_SHARE // KERNEL_BYTES))


def bound_kernel_caches(budget: int) -> None:
    """Let oneDNN, and torch's layer over it, keep 16 to 128 compiled kernels each, not 1024; a user's setting stays.

    They keep one per shape, 0.65 MB, and in a prompt each expert multiplies a number of rows of its own: gpt-oss in
    bfloat16 on a CPU with AMX grew by 230 MB with the first prompt and 340 MB with four, beside its budget; with 128 it
    stops growing after the first. (To compute a few rows more instead, so that there are fewer shapes, changed results
    there by a rounding.) But 128 of them are 70 MB, which a budget of 30 MB has no room for: with 16, a prompt of 512
    tokens peaked at 121 MB instead of 190, and took a fifth longer.

    Where there are many experts 128 are few: a layer comes round to a shape when it is just gone. A prompt of 512
    tokens with the experts of Qwen3-30B-A3B took 2.9 s of processor time in 6 layers with 128 or 256, and 1.9 s with
    1024 in oneDNN alone (CPU with AMX). But then a process inside 3.8 GB outgrew its budget by more than 70 MB, and was
    ended by its cgroup. Whoever has the memory sets ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024.

    The variables are read when the first kernel is compiled: where something else in the process came first, nothing
    changes, and of several models the first one's budget counts.

    A process that this one starts inherits the variables. Its own model has its own budget, so `SET_BY` says which
    process chose them: a value that another process chose is chosen anew, one that a user chose has no such mark.
    """
    chosen_by, _, chosen = os.environ.get(SET_BY, "").partition(":")
    if chosen_by == str(os.getpid()):
        return
    count = str(kept_kernels(budget))
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        if os.environ.get(variable, chosen) == chosen:
            os.environ[variable] = count
    os.environ[SET_BY] = f"{os.getpid()}:{count}"
