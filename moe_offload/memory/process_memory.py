"""Memory that no tensor holds and no budget counts: what the C heap and oneDNN's cache of kernels keep."""

from __future__ import annotations

import contextlib
import ctypes
import os

KERNEL_BYTES = 650_000
KERNEL_SHARE = 8  # oneDNN's kernels may take an eighth of a budget, but are never fewer or more than these two
FEWEST_KERNELS, MOST_KERNELS = 16, 1024
MOST_WRAPPED = 128  # in torch's layer over oneDNN's cache: what is in the one below is found fast
SET_BY = "_MOE_OFFLOAD_KERNELS"  # "<process>:<kernels of oneDNN>,<of the layer over it>"


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
    """Let oneDNN, and torch's layer over it, keep as many compiled kernels as the budget has room for, not 1024 each; a
    user's setting stays.

    They keep one per shape, up to 0.65 MB, and in a prompt each expert multiplies a number of rows of its own: gpt-oss
    in bfloat16 on a CPU with AMX grew by 230 MB with the first prompt and 340 MB with four, beside its budget. (To
    compute a few rows more instead, so that there are fewer shapes, changed results there by a rounding.) With 16 of
    them, inside 30 MB, a prompt of 512 tokens peaked at 121 MB instead of 190, and took a fifth longer.

    Too few are dear where there are many experts: a layer comes round to a shape when it is just gone. A prompt of 512
    tokens with the experts of Qwen3-30B-A3B took 2.9 s of processor time in 6 layers with 128 or 256, and 1.9 s with
    1024 in oneDNN alone, for 50 MB more (CPU with AMX). Those of gpt-oss grew by 100 MB in eight prompts of many
    lengths, and then no more.

    The variables are read when the first kernel is compiled: where something else in the process came first, nothing
    changes, and of several models the first one's budget counts.

    A process that this one starts inherits the variables. Its own model has its own budget, so `SET_BY` says which
    process chose them: a value that another process chose is chosen anew, one that a user chose has no such mark.
    """
    chosen_by, _, chosen = os.environ.get(SET_BY, "").partition(":")
    if chosen_by == str(os.getpid()):
        return
    kernels = kept_kernels(budget)
    counts = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(kernels), "LRU_CACHE_CAPACITY": str(min(kernels, MOST_WRAPPED))}
    earlier = dict(zip(counts, chosen.split(","), strict=False)) if chosen else {}
    for variable, count in counts.items():
        if os.environ.get(variable, earlier.get(variable)) == earlier.get(variable):
            os.environ[variable] = count
    os.environ[SET_BY] = f"{os.getpid()}:{','.join(counts.values())}"
