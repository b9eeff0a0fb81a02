"""Run a compiled kernel on the threads that torch computes with.

A pool of our own would be a second one on the same cores: the idle threads of torch's OpenMP spin for milliseconds
after each product, and ours for theirs (a token took 142 ms instead of 75). So a kernel is started by GOMP_parallel,
which is what torch itself calls for every parallel loop: the threads are the same ones, awake and with warm caches.
The dynamic linker is asked for that name as it was asked for torch, so it is the library that torch runs on, whichever
that is (libgomp, or Intel's, which has the same entry). Where there is none, a kernel runs in the thread that calls it.

A kernel is a C function of one address, that of its job: the numbers it works with, addresses of tensors among them.

    @kernel
    def add_one(data):
        job, begin, end = share(data)
        rows_OI = array_at(job[0], (job[1], job[2]), np.int64)
        ...
    run(add_one, rows=outputs, job=[tensor.data_ptr(), outputs, inputs], work=tensor.numel())

Shares are the contiguous ones of `at::parallel_for`: what a thread writes is what it reads in torch's next product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

#: Fewer elements than this are done by one thread: waking the others takes some microseconds.
SMALL = 1 << 15
HEAD = 3  # of a job: address of omp_get_thread_num, of omp_get_num_threads (or 0), and the number of rows
LONGEST = 16  # numbers of one job
ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@intrinsic
def _pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """An address as a pointer."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), build


@intrinsic
def _call(typingctx, address):  # type: ignore[no-untyped-def]
    """What the C function `int f(void)` at an address returns."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        function = cgutils.ir.FunctionType(cgutils.int32_t, [])
        return builder.call(builder.inttoptr(args[0], function.as_pointer()), [])

    return types.int32(address), build


@numba.njit(inline="always")
def array_at(address, shape, dtype):  # type: ignore[no-untyped-def]
    """The array of so many elements at an address."""
    return carray(_pointer(address), shape, dtype)


def compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled without Python objects, kept on disk where there is a folder for it."""
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # neither this folder nor the user's cache can be written: compiled anew in each process
        return numba.njit(function, nogil=True)


class kernel:  # lower case, because it is used as a decorator
    """A decorator: a function becomes a C function of the address of a job, compiled when it is first run.

    Compiled code on disk does not notice when another file changes: whoever changes `share` or `array_at` empties the
    folders `__pycache__`.
    """

    def __init__(self, function: Callable[[Any], None]):
        self.function = function

    @cached_property
    def address(self) -> int:
        signature = types.void(types.voidptr)
        try:
            self.made = numba.cfunc(signature, nopython=True, cache=True)(self.function)
        except RuntimeError:
            self.made = numba.cfunc(signature, nopython=True)(self.function)
        return int(self.made.address)


@numba.njit(inline="always")
def share(data):  # type: ignore[no-untyped-def]
    """The numbers of a job, and the rows [begin, end) that are this thread's."""
    head = carray(data, (HEAD,), np.int64)
    thread, threads = 0, 1
    if head[0] != 0:
        thread, threads = _call(head[0]), _call(head[1])
    step = (head[2] + threads - 1) // threads
    begin = min(thread * step, head[2])
    return carray(data, (HEAD + LONGEST,), np.int64)[HEAD:], begin, min(begin + step, head[2])


def run(function: kernel, rows: int, job: Sequence[int], work: int) -> None:
    """Have all rows done: by torch's threads, or by this one where the work (elements) is small."""
    threads = 1 if work < SMALL else torch.get_num_threads()
    entries = _openmp() if threads > 1 else None
    values = (*(entries[1:] if entries else (0, 0)), rows, *job)
    data = (ctypes.c_int64 * len(values))(*values)
    if entries:
        entries[0](function.address, ctypes.addressof(data), threads, 0)
    else:
        ENTRY(function.address)(ctypes.addressof(data))


@cache
def _openmp() -> tuple[Any, int, int] | None:
    """GOMP_parallel, and the addresses of the functions by which a thread learns which one it is."""
    linked = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    for name in (None, linked):  # what torch was linked against: found globally, else in its own dependencies
        try:
            library = ctypes.CDLL(name)
            start = library.GOMP_parallel
            asked = [ctypes.cast(getattr(library, f"omp_get_{what}"), ctypes.c_void_p).value for what in ASKED]
        except (AttributeError, OSError):
            continue
        start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return start, int(asked[0] or 0), int(asked[1] or 0)
    return None


ASKED = ("thread_num", "num_threads")
