"""Whether bytes hold a code that means no number, eight bytes at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .pool import array_at, kernel, run, share

LOW, ONES, HIGH = (np.uint64(byte * 0x0101010101010101) for byte in (0x7F, 0x01, 0x80))
CHUNK = 4096  # bytes: a row of work


def has_byte(tensor: Tensor, *, signed: bool) -> bool:
    """Whether a contiguous tensor has a byte 0xff, or, of signed codes, 0x7f or 0xff."""
    size, address = tensor.numel(), tensor.data_ptr()
    first = min(-address % 8, size)  # words are read where they are aligned
    chunks, found = (size - first) // CHUNK, torch.zeros(1, dtype=torch.int64, device="cpu")
    run(_scan, chunks, (address + first, int(signed), found.data_ptr()), chunks * CHUNK)
    flat = tensor.view(torch.uint8).view(-1)
    ends = torch.cat([flat[:first], flat[first + chunks * CHUNK :]])
    return bool(found) or bool(((ends | 0x80 if signed else ends) == 0xFF).any())


@kernel
def _scan(data):  # type: ignore[no-untyped-def]
    """Of bytes without their upper bit, 0x7f is the only one that adding 1 makes 0x80; none carries over."""
    job, begin, end = share(data)
    words = array_at(job[0], (end * (CHUNK // 8),), np.uint64)
    either, both = np.uint64(0), np.uint64(0)
    for i in range(begin * (CHUNK // 8), end * (CHUNK // 8)):
        full = (words[i] & LOW) + ONES
        either |= full
        both |= full & words[i]
    if ((either if job[1] else both) & HIGH) != 0:
        array_at(job[2], (1,), np.int64)[0] = 1
