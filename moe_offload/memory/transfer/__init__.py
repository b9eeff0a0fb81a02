"""Move rows from a store into the memory of the device that computes: see `ticket.py` for what is promised.

`TRANSFERS` is the table: adding a kind of device is one class and one line.
"""

from __future__ import annotations

from collections.abc import Callable

from .ticket import Ticket, Transfer


def _cpu(device: str) -> Transfer:
    from .threads import ThreadTransfer

    return ThreadTransfer()


def _cuda(device: str) -> Transfer:
    import torch

    from .staged import DeviceTransfer
    from .streams import CudaStreams

    return DeviceTransfer(CudaStreams(torch.device(device)))


#: Kind of device -> what moves rows to it, made from its name ("cpu", "cuda:0").
TRANSFERS: dict[str, Callable[[str], Transfer]] = {"cpu": _cpu, "cuda": _cuda}

__all__ = ["TRANSFERS", "Ticket", "Transfer"]
