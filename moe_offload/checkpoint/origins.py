"""Which tensors of a checkpoint each parameter of experts is loaded from: transformers' own renaming of names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, UnsupportedModelError
from ..experts import MoELayer, Place
from .headers import Headers
from .quantised.misfits import refuse_foreign


@dataclass
class Origin:
    """Where one stacked parameter comes from: `{source pattern: its keys, in loading order}` and their converter."""

    converter: Any = None  # a WeightConverter, or None: the one key is the parameter itself
    share: int = 0  # which of the converter's targets the parameter is
    parts: dict[str | None, list[str]] = field(default_factory=dict)


def find_origins(model: nn.Module, headers: Headers, wanted: set[str]) -> dict[str, Origin]:
    """Group checkpoint keys by the wanted parameter they load into: transformers' own loop, without its tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # late, as in conversion.py
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model, hf_quantizer=getattr(model, "hf_quantizer", None))  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, names = getattr(model, "base_model_prefix", ""), model.state_dict()
    origins: dict[str, Origin] = {}
    for key in sorted([*headers, *headers.unreadable], key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if target not in names and key in names:  # named as in the model already: not to be renamed after all
            target, pattern = rename_source_key(key, [], [], prefix, names)
        if target not in names:
            continue
        if key in headers.unreadable:
            dtype, file = headers.unreadable[key]
            raise UnsupportedModelError(
                f"{file}: {key!r}, which the model needs, is of dtype {dtype}, which torch {torch.__version__} does "
                "not have. Use a checkpoint in another dtype, or a later torch"
            )
        converter = None if pattern is None else by_pattern[pattern]
        for share, parameter in enumerate(_targets(target, converter)):
            if parameter in wanted:
                origin = origins.setdefault(parameter, Origin(converter, share))
                if origin.converter is not converter:
                    other = next(iter(origin.parts.values()))[0]
                    raise CheckpointError(
                        f"{parameter}: the checkpoint has it in two forms, {other!r} and {key!r}; which one counts "
                        "cannot be told. Remove the shard that does not belong"
                    )
                origin.parts.setdefault(pattern, []).append(key)
    return origins


def _targets(target: str, converter: Any) -> Iterator[str]:
    """The parameters a key contributes to; renaming gives only the first of them."""
    patterns = [""] if converter is None else converter.target_patterns
    for pattern in patterns:
        yield target if pattern == patterns[0] else target.replace(patterns[0], pattern, 1)


def origin_of(
    model: Any, moe: MoELayer, place: Place, origins: dict[str, Origin], headers: Headers
) -> tuple[str, Origin]:
    """The parameter at `place` and its origin; those tied between modules are stored under one name, not always the
    first."""
    for name in moe.names:
        if f"{name}.{place.key}" in origins:
            return f"{name}.{place.key}", origins[f"{name}.{place.key}"]
    refuse_foreign(model.config, headers, f"{moe.name}.{place.key}")
    near = [key for key in headers if key.startswith(f"{moe.name.rpartition('.')[0]}.")][:3]
    stacked = place.expert is None
    lacks = f"none of its {moe.num_experts} experts has" if stacked else f"expert {place.expert} has no"
    raise CheckpointError(
        f"{moe.name}: {lacks} {place.field} in the checkpoint; near that name it has {near or 'nothing'}. Use the "
        "checkpoint that belongs to this configuration"
    )


def own_key(parameter: str, origin: Origin) -> str:
    """The one key of a parameter that is read as it is."""
    if origin.converter is not None:
        raise UnsupportedModelError(
            f"{parameter}: transformers builds it from the checkpoint with {origin.converter.operations!r}, and of "
            "such a model it is read as it is. Load the whole model with transformers and offload that"
        )
    keys = [key for part in origin.parts.values() for key in part]
    if len(keys) > 1:
        raise CheckpointError(
            f"{parameter}: the checkpoint has it twice, as {keys[0]!r} and {keys[1]!r}; which one counts cannot be "
            "told. Remove the shard that does not belong"
        )
    return keys[0]
