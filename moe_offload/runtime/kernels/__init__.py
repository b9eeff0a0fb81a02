"""What decides, copies and multiplies on the compute device, without asking the host.

    decide(ids, state, loads, pace)   which slots, and what must be loaded first          state.py
    decide_top(scores, k, state, ...) the same of the k experts that a router scores best
    gather(rows, bank, loads)         load it, from host memory that the device can read
    indexed_mm(x, weight, slots)      multiply straight from the slots: a few pairs, a decode step's
    gated_mm(x, weight, slots)        silu(gate) * up of such products
    grouped_mm(x, weight, slots)      many pairs, a prompt's
    packed_*(x, rows, slots, codes)   the three products with weights that lie packed in their rows     packed/

`KERNELS` has one set for each kind of device; all give the same bits (products: their own rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import OffloadError
from ...experts import RowCodes
from .state import DeviceState, Loads, make_pace

__all__ = ["KERNELS", "DeviceState", "Kernels", "Loads", "make_pace"]


PackedProduct = Callable[[Tensor, Tensor, Tensor, RowCodes], Tensor]


class Kernels(NamedTuple):
    """Shapes: T tokens, P token-expert pairs, E experts, K of them a token, S slots, N elements of one row, H hidden, M
    or O outputs of one matrix, I half of M.

    decide(ids_P, state, loads, pace_2) -> slots_P     int64 slots of one event's ids, 1 to S of them; `loads` says what
                                                       must be gathered before they are read. Ids outside [0, E) are
                                                       counted in `state.totals_4` and get slot 0, whatever is in it.
    decide_top(scores_TE, k, state, loads, pace_2)     -> values_TK, ids_TK, slots_P: what torch.topk(scores_TE, k, -1)
                                                       gives there, and their slots. Scores of 2 or 4 bytes, k up to 32.
    chooses_as_torch(experts, k, device) -> bool       whether `decide_top` may stand for torch.topk on this device.
    gather(rows_EN, bank_SN, loads)                    copies the rows of `loads` into their slots. Rows of rows_EN and
                                                       bank_SN are contiguous and multiples of 16 bytes.
    indexed_mm(x_PH, weight_SMH, slots_P) -> out_PM    `weight[slots[p]] @ x[p]` in x's dtype, summed in float32; the
                                                       weight may be any view of the bank.
    gated_mm(x_PH, weight_SMH, slots_P) -> out_PI      silu of the first I of these products, times the other I.
    grouped_mm(x_PH, weight_SHO, slots_P) -> out_PO    `x[p] @ weight[slots[p]]`, likewise. Fast where the pairs of one
                                                       slot are neighbours, in any order of slots; right wherever they
                                                       are.
    packed_indexed_mm, packed_gated_mm, packed_grouped_mm  the same products with weights [M, H] whose codes and scales
                                                       lie in rows_SB, bytes, where `codes` say.
    """

    decide: Callable[[Tensor, DeviceState, Loads, Tensor], Tensor]
    decide_top: Callable[[Tensor, int, DeviceState, Loads, Tensor], tuple[Tensor, Tensor, Tensor]]
    chooses_as_torch: Callable[[int, int, torch.device], bool]
    gather: Callable[[Tensor, Tensor, Loads], None]
    indexed_mm: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated_mm: Callable[[Tensor, Tensor, Tensor], Tensor]
    grouped_mm: Callable[[Tensor, Tensor, Tensor], Tensor]
    packed_indexed_mm: PackedProduct
    packed_gated_mm: PackedProduct
    packed_grouped_mm: PackedProduct


def _cpu() -> Kernels:
    from .packed import reference as packed
    from .reference import decide, decide_top, gated_mm, gather, grouped_mm, indexed_mm

    products = (packed.indexed_mm, packed.gated_mm, packed.indexed_mm)
    return Kernels(decide, decide_top, lambda *_: True, gather, indexed_mm, gated_mm, grouped_mm, *products)


def _cuda() -> Kernels:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise OffloadError(
            f"the kernels for CUDA need Triton, which cannot be imported ({error}). It comes with PyTorch for CUDA on "
            "Linux: install that, or Triton itself (pip install triton)"
        ) from error
    from .decide_triton import decide
    from .gated_triton import gated_mm
    from .gather_triton import gather
    from .grouped_triton import grouped_mm
    from .indexed_triton import indexed_mm
    from .packed import few_triton, many_triton
    from .top_triton import chooses_as_torch, decide_top

    products = (few_triton.indexed_mm, few_triton.gated_mm, many_triton.grouped_mm)
    return Kernels(decide, decide_top, chooses_as_torch, gather, indexed_mm, gated_mm, grouped_mm, *products)


#: Kind of device -> its kernels, imported when they are first asked for.
KERNELS: dict[str, Callable[[], Kernels]] = {"cpu": _cpu, "cuda": _cuda}
