"""What decides, copies and multiplies on the compute device, without asking the host.

    decide(ids, state, loads, pace)   which slots, and what must be loaded first          state.py
    gather(rows, bank, loads)         load it, from host memory that the device can read
    indexed_mm(x, weight, slots)      multiply straight from the slots

`KERNELS` has one set for each kind of device; all give the same bits (indexed_mm: its own rounding).
"""

from __future__ import annotations

from typing import Any

from . import reference

KERNELS: dict[str, Any] = {"cpu": reference}
