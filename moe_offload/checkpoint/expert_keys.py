"""Which of a checkpoint's keys belong to which expert of a layer.

one tensor per expert   experts.17.up_proj.weight    by the number in its name
one stacked tensor      experts.up_proj [E, ...]     by its first dimension
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import CheckpointError
from ..experts import MoELayer
from .headers import Headers, TensorRange, files_of


def one_key_per_expert(
    moe: MoELayer, label: str, keys: list[str], shares: int, share: int, headers: Headers
) -> list[str]:
    """The keys of this layer's experts, in order of their number, where the checkpoint has one tensor per expert.

    With several `shares`, the list is cut into that many equal runs, one per layer. The loader goes by position in the
    list, so a hole in the numbering would silently give every later expert its neighbour's weights.
    """
    numbers, where = _numbers(keys, headers), _places(keys, headers)
    first = share * -(-len(keys) // shares)
    absent = sorted(set(range(first, first + moe.num_experts)) - set(numbers))
    if absent:
        which = f"expert {absent[0]} has" if len(absent) == 1 else f"experts {_some(absent)} have"
        raise CheckpointError(
            f"{moe.name}: {which} no {label} in the checkpoint, which has {len(keys)} of them for "
            f"{shares * moe.num_experts} experts{where}. Download the missing shard, or use the right configuration"
        )
    if len(keys) > shares * moe.num_experts or len(set(numbers)) != len(numbers):
        raise CheckpointError(
            f"{moe.name}: the checkpoint has {label} of {len(keys)} experts, the model has "
            f"{shares * moe.num_experts}{where}. Use the checkpoint that belongs to this configuration"
        )
    by_number = dict(zip(numbers, keys, strict=True))
    return [by_number[number] for number in range(first, first + moe.num_experts)]


def slice_stack(
    moe: MoELayer, label: str, keys: list[str], headers: Headers, joined: int | None = None
) -> list[TensorRange]:
    """One slice per expert of the one tensor in which the checkpoint stacks them; `joined`: each has so many rows of
    it, one below the other."""
    ranges = {key: headers[key] for key in keys}
    if joined is not None:
        ranges = {key: apart for key, found in ranges.items() if (apart := _apart(found, joined)) is not None}
    found = {key: list(range_.shape) for key, range_ in ranges.items()}
    if len(keys) != 1 or len(found) != 1 or found[keys[0]][:1] != [moe.num_experts]:
        raise CheckpointError(
            f"{moe.name}: expected one tensor {label} of {moe.num_experts} experts, the checkpoint has "
            f"{found or 'none'}{_places(keys, headers)}. Use the checkpoint that belongs to this configuration"
        )
    return [ranges[keys[0]][e] for e in range(moe.num_experts)]


def _apart(range_: TensorRange, rows: int) -> TensorRange | None:
    """A matrix as a stack of matrices of so many rows; None if it is none."""
    if len(range_.shape) < 2 or range_.shape[0] % rows:
        return None
    return replace(range_, shape=(range_.shape[0] // rows, rows, *range_.shape[1:]))


def _places(keys: list[str], headers: Headers) -> str:
    return f" (in {files_of(headers[key] for key in keys)})" if keys else ""


def _numbers(keys: list[str], headers: Headers) -> list[int]:
    """The experts' numbers: the one part in which the keys of a list differ (of a single key, its last number)."""
    split = [key.split(".") for key in keys]
    if not split:
        return []
    varying = [column for column in zip(*split, strict=False) if len(set(column)) > 1]
    numeric = [column for column in zip(*split, strict=False) if all(part.isdecimal() for part in column)]
    column = varying[0] if len(varying) == 1 else numeric[-1] if not varying and numeric else ()
    if len(column) != len(keys) or not all(part.isdecimal() for part in column):
        raise CheckpointError(
            f"expected tensor names that differ only in an expert's number, found {keys[:3]}{_places(keys, headers)}; "
            "cannot tell them apart. Use the checkpoint that belongs to this configuration"
        )
    return [int(part) for part in column]


def label_of(pattern: str) -> str:
    """What a source pattern calls the tensor: 'up_proj' of 'mlp.experts.*.up_proj.weight'."""
    return pattern.replace("\\", "").rpartition("*.")[2].removesuffix(".weight")


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
