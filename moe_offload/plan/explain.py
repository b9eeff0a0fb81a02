"""Which rule put what where, and what was not offloaded and why: the text of `model.moe_offload.explain()`.

48 MoE layers (0-47): slots on cuda:0, rows in RAM         by "model.layers.*.mlp.experts": "cpu"
not offloaded: attention 1.81 GB, every token uses all of it ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from torch import nn

from ..config.sizes import format_size
from ..experts import MoELayer
from .arrange import Arrangement

PLACES = {"disk": "on disk", "host": "in RAM"}

#: Kinds of dense weights by a part of their module's name, and why each stays in memory; the first that fits counts.
KINDS = [
    (("shared_expert", "shared_mlp"), "shared experts", "every token uses them, so they would never be evicted"),
    (("embed", "lm_head", "wte"), "embeddings and head", "every token needs the whole head"),
    (("attn", "attention", "mixer", "ssm", "mamba", "conv"), "attention", "every token uses all of it"),
    (("gate", "router"), "routers", "they decide which experts are needed"),
    (("mlp", "feed_forward", "ffn"), "dense feed-forward layers", "they have no experts to choose from"),
    (("",), "norms and the rest", "small, and used by every token"),
]


def explain_arrangement(model: Any, moe_layers: Sequence[MoELayer], arrangement: Arrangement) -> str:
    """Tell how `model` (it may be on the meta device, or offloaded) is arranged: a paragraph for experts, one for the
    rest."""
    lines = ["experts:"]
    layers = list(zip(range(len(moe_layers)), moe_layers, arrangement.spots, arrangement.slots, strict=True))
    for spot, group in groupby(layers, key=lambda layer: layer[2]):
        members = list(group)
        size = format_size(sum(moe.nbytes for _, moe, _, _ in members))
        (first, moe, _, _), (last, *_) = members[0], members[-1]
        lines.append(
            f"  MoE layer{f' {first}' if first == last else f's {first}-{last}'} "
            f"({moe.name}{'' if first == last else ' ...'}): {_range(n for *_, n in members)} slots each on "
            f"{spot.device}, {size} of rows {PLACES[spot.tier]}\n    by {spot.rule}"
        )
    if arrangement.host_room_bytes is not None:
        lines.append(
            f"  RAM: {format_size(arrangement.host_bytes)} of rows, of "
            f"{format_size(max(arrangement.host_room_bytes, 0))} that max_memory['cpu'] leaves for them"
        )
    packed = next((moe for moe in moe_layers if moe.packed), None)
    if packed is not None:
        lines.append(
            f"  rows rest as the checkpoint has them, in {packed.packed[0].format}: "
            f"{format_size(packed.layout.row_bytes)} for {format_size(packed.unpacked.row_bytes)} of weights, "
            "unpacked where they are used"
        )
    lines.append("not offloaded, held where they compute:")
    lines += [
        f"  {kind:<28}{format_size(size):>12}  {why}" for kind, size, why in list_dense_weights(model, moe_layers)
    ]
    return "\n".join(lines)


def list_dense_weights(model: nn.Module, moe_layers: Sequence[MoELayer]) -> list[tuple[str, int, str]]:
    """What is not offloaded: `(kind, bytes, why)`, the largest first. Tied weights count once."""
    seen = {id(param) for moe in moe_layers for param in moe.tensors}
    found: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kind = next(kind for parts, kind, _ in KINDS if any(part in name.lower() for part in parts))
            found[kind] = found.get(kind, 0) + tensor.numel() * tensor.element_size()
    why = {kind: reason for _, kind, reason in KINDS}
    return sorted(((kind, size, why[kind]) for kind, size in found.items()), key=lambda row: -row[1])


def _range(numbers: Iterable[int]) -> str:
    several = sorted(set(numbers))
    return f"{several[0]}" if len(several) == 1 else f"{several[0]} to {several[-1]}"
