"""A device that is not there: its tensors say that they are elsewhere, hold those of the host, and count who waits.

Everything that a real device would do on the spot is done; what is not a kernel of the device is an error, as there:
a tensor of the host among its operands, and every operator that would have to ask the device for a number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")  # the one that any build of torch can name
ASK = {"nonzero", "_local_scalar_dense", "masked_select", "unique_consecutive", "_unique2", "equal", "bincount"}


class Far(Tensor):
    """`near` is the tensor of the host that it stands before."""

    @staticmethod
    def __new__(cls, near):
        return Tensor._make_wrapper_subclass(
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=DEVICE
        )

    def __init__(self, near):
        self.near = near

    def tolist(self):
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise AssertionError(f"{op} outside of Fabric")


class Fabric(TorchDispatchMode):
    """While this is active there is such a device; `waits` are the operators that waited for it."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        far = [x for x in tensors if isinstance(x, Far)]
        name = op._schema.name.partition("::")[2]
        target = kwargs.get("device")
        makes = target is not None and torch.device(target).type == DEVICE.type
        if not far and not makes:
            return op(*args, **kwargs)
        kwargs |= {"device": torch.device("cpu")} if target is not None else {}
        leaves = target is not None and not makes
        if name in ASK or (name in ("_to_copy", "copy_") and (leaves or len(far) < len(tensors) or not far)):
            self.waits.append(name)  # between the host and the device: pageable, so it waits
        elif far and any(not isinstance(x, Far) and x.dim() for x in tensors):
            raise AssertionError(f"{op} was given tensors of the device and of the host")
        near = tree_map_only(Far, lambda x: x.near, (args, kwargs))
        out = op(*near[0], **near[1])
        if leaves or name == "_local_scalar_dense":
            return out
        same = {id(x.near): x for x in far}
        return tree_map_only(Tensor, lambda x: same.get(id(x)) if id(x) in same else Far(x), out)
