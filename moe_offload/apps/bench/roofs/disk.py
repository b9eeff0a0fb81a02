"""What the disk gives to whoever just reads: the roof that streamed experts are measured against.

A few threads read pieces of the very files the experts rest in, past the page cache, at random places, as many at once
and as large as the engine's own reads. Nothing is done with the bytes.
"""

from __future__ import annotations

import logging
import mmap
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ....files.opened import open_uncached
from ....files.system import CACHED

logger = logging.getLogger("moe_offload")

ALIGN = 4096
SECONDS = 1.5  # of reading, each time: less says little of a disk


class DiskRoof:
    """`disk_roof` of the very files the experts rest in, by reads as large and as many at once as the engine's own."""

    def __init__(self, files: Sequence[Path], read_bytes: int, depth: int, others: dict[str, float] | None = None):
        self.files, self.read_bytes, self.depth, self._others = files, read_bytes, depth, others or {}

    def measure(self, seed: int) -> float:
        return disk_roof(self.files, self.read_bytes, self.depth, SECONDS, seed)

    def details(self) -> dict[str, float]:
        return self._others


def disk_roof(files: Sequence[Path], read_bytes: int, depth: int, seconds: float, seed: int) -> float:
    """Bytes per second of `depth` readers that each ask for `read_bytes` at a time (O_DIRECT where it is allowed)."""
    read_bytes = max(ALIGN, read_bytes // ALIGN * ALIGN)
    sizes = [(file, file.stat().st_size) for file in files]
    opened, ways = [], set()
    for path, size in sizes:
        if size >= read_bytes:
            file, how = open_uncached(path)
            opened.append((file, size))
            ways.add(how)
    if CACHED in ways:
        logger.warning("the roof of the disk is that of the page cache: these files cannot be read past it here")
    done = [0] * depth
    failed: list[BaseException] = []
    begun = time.perf_counter()

    def read(i: int) -> None:
        choose = random.Random(seed * 1000 + i)
        buffer = mmap.mmap(-1, read_bytes)
        weights = [size for _, size in opened]
        try:
            while time.perf_counter() - begun < seconds:
                file, size = choose.choices(opened, weights)[0]
                offset = choose.randrange((size - read_bytes) // ALIGN + 1) * ALIGN
                done[i] += os.preadv(file.fileno(), [buffer], offset)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(depth)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for file, _ in opened:
            file.close()
    if failed:
        raise failed[0]
    return sum(done) / (time.perf_counter() - begun)
