"""Which part of a machine's memory rows lie in: a GPU of a machine with several sockets hangs on one of them, and reads
what lies at another through the link between the two, at about half the speed.

By default a page lies at the socket (the NUMA node) of the thread that touches it first.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PCI = Path("/sys/bus/pci/devices")
NODES = Path("/sys/devices/system/node")
MBIND = {"x86_64": 237, "aarch64": 235}  # the number of the system call mbind(2), which libc has no function for
PREFERRED = 1  # MPOL_PREFERRED: other nodes serve where this one has no free page
#: What is raised where a GPU is unknown to the system, or to a torch that is too old or has no CUDA.
UNKNOWN = (OSError, ValueError, AttributeError, AssertionError, RuntimeError)
BITS = 64  # of a word of the mask of nodes


def node_of(device: str) -> int | None:
    """The NUMA node that a GPU hangs on; None where the machine has one node only, or does not say."""
    if len(list(NODES.glob("node[0-9]*"))) < 2:
        return None
    try:
        one: Any = torch.cuda.get_device_properties(device)
        place = f"{one.pci_domain_id:04x}:{one.pci_bus_id:02x}:{one.pci_device_id:02x}.0"
        node = int((PCI / place / "numa_node").read_text())
    except UNKNOWN:
        return None
    return node if node >= 0 else None


def prefer_node(pages: Tensor, node: int) -> bool:
    """Let pages that nobody has touched yet come from `node`; False where the system does not do that, or may not (in a
    container, without CAP_SYS_NICE): then they lie where they are touched first."""
    number = MBIND.get(platform.machine())
    if number is None:
        return False
    words = (ctypes.c_ulong * (node // BITS + 1))()
    words[node // BITS] = 1 << node % BITS
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    system_call.restype = ctypes.c_long
    code = system_call(
        ctypes.c_long(number),
        ctypes.c_void_p(pages.data_ptr()),
        ctypes.c_ulong(pages.nbytes),
        ctypes.c_long(PREFERRED),
        ctypes.byref(words),
        ctypes.c_ulong(len(words) * BITS + 1),
        ctypes.c_ulong(0),
    )
    return bool(code == 0)
