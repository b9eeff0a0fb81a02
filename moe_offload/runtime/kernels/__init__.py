"""What decides, copies and multiplies on the compute device, without asking the host.

    decide(ids, state, loads, pace)   which slots, and what must be loaded first          state.py
    gather(rows, bank, loads)         load it, from host memory that the device can read
    indexed_mm(x, weight, slots)      multiply straight from the slots: a few pairs, a decode step's
    grouped_mm(x, weight, slots)      many pairs, a prompt's

`KERNELS` has one set for each kind of device; all give the same bits (products: their own rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ...errors import OffloadError
from .state import DeviceState, Loads, make_pace

__all__ = ["KERNELS", "DeviceState", "Kernels", "Loads", "make_pace"]


class Kernels(NamedTuple):
    """Shapes: P token-expert pairs, E experts, S slots, N elements of one row, H hidden, M or O outputs of one matrix.

    decide(ids_P, state, loads, pace_2) -> slots_P     int64 slots of one event's ids, 1 to S of them; `loads` says what
                                                       must be gathered before they are read. Ids outside [0, E) are
                                                       counted in `state.totals_4` and get slot 0, whatever is in it.
    gather(rows_EN, bank_SN, loads)                    copies the rows of `loads` into their slots. Rows of rows_EN and
                                                       bank_SN are contiguous and multiples of 16 bytes.
    indexed_mm(x_PH, weight_SMH, slots_P) -> out_PM    `weight[slots[p]] @ x[p]` in x's dtype, summed in float32; the
                                                       weight may be any view of the bank.
    grouped_mm(x_PH, weight_SHO, slots_P) -> out_PO    `x[p] @ weight[slots[p]]`, likewise. Fast where the pairs of one
                                                       slot are neighbours, in any order of slots; right wherever they
                                                       are.
    """

    decide: Callable[[Tensor, DeviceState, Loads, Tensor], Tensor]
    gather: Callable[[Tensor, Tensor, Loads], None]
    indexed_mm: Callable[[Tensor, Tensor, Tensor], Tensor]
    grouped_mm: Callable[[Tensor, Tensor, Tensor], Tensor]


def _cpu() -> Kernels:
    from .reference import decide, gather, grouped_mm, indexed_mm

    return Kernels(decide, gather, indexed_mm, grouped_mm)


def _cuda() -> Kernels:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise OffloadError(
            f"the kernels for CUDA need Triton, which cannot be imported ({error}). It comes with PyTorch for CUDA on "
            "Linux: install that, or Triton itself (pip install triton)"
        ) from error
    from .decide_triton import decide
    from .gather_triton import gather
    from .grouped_triton import grouped_mm
    from .indexed_triton import indexed_mm

    return Kernels(decide, gather, indexed_mm, grouped_mm)


#: Kind of device -> its kernels, imported when they are first asked for.
KERNELS: dict[str, Callable[[], Kernels]] = {"cpu": _cpu, "cuda": _cuda}
