"""`Share`: which experts of a layer this process has, where expert parallelism splits them over several.

transformers gives rank r of N the experts [r * E/N, (r + 1) * E/N) as a DTensor, and calls its experts module with
local numbers. A pair that is another rank's has a number that is no expert's here (the local count, or -1): it is
neither counted, loaded nor computed.

    E = 8, N = 2      rank 0: experts 0..3, elsewhere 4      rank 1: experts 4..7, which it calls 0..3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class Share:
    """The experts [first, first + a layer's num_experts) of `total`: those of `rank` among `world` processes."""

    rank: int
    world: int
    first: int
    total: int


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a DTensor's local part, of any other tensor all."""
    # Not isinstance: importing DTensor takes half a second, and whoever has one has imported it.
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def find_share(name: str, module: nn.Module, stacks: Mapping[str, Tensor]) -> Share | None:
    """The share that this process has of the stacked weights of `module`; None where it has all of them.

    Raises `UnsupportedModelError` where they are split in another way than by expert.
    """
    if not any(hasattr(stack, "device_mesh") for stack in stacks.values()):
        return None
    shares = {_share_of(name, field, stack) for field, stack in stacks.items()}
    if len(shares) != 1 or not getattr(module, "_is_expert_parallel", False):
        raise UnsupportedModelError(
            f"{name}: its experts are DTensors, but not split by expert parallelism; load the model with "
            "DistributedConfig(tp_size=N, ep_size=N), or in one process"
        )
    return shares.pop()


def _share_of(name: str, field: str, stack: Any) -> Share:
    mesh, placements = getattr(stack, "device_mesh", None), list(getattr(stack, "placements", ()))
    if mesh is None or mesh.ndim != 1 or not placements[0].is_shard(0):
        raise UnsupportedModelError(
            f"{name}: {field} is split over processes as {tuple(placements)}; whole experts are offloaded, each in one "
            "process. Load the model with DistributedConfig(tp_size=N, ep_size=N), or in one process"
        )
    rank, world, total = mesh.get_local_rank(), mesh.size(), stack.shape[0]
    if total % world:
        raise UnsupportedModelError(
            f"{name}: {total} experts do not go evenly over {world} processes; start as many as divide them"
        )
    return Share(rank, world, rank * (total // world), total)
