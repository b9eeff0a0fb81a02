"""The metadata of packed files: written by `pack.py`, read back by `packed.py`.

    moe_offload_rows     every file: version, model type, and per layer its fields and its recipe
    moe_offload_sources  the first file: names, dtypes and shapes of the tensors that rows were made of, without bytes

`packed.py` tells what both are for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..experts import FIELD_ALIGN, Begins, MoELayer
from .headers import DTYPE_NAMES, DTYPES, Headers, TensorRange
from .row_index import RowSource

VERSION = 2  # 1 did not say where matrices of float32 began in the checkpoint
#: The file that sources lie in: they tell names, shapes and dtypes, and are not to be read.
NOWHERE = Path("packed away")


def describe_layer(moe: MoELayer, rows: Sequence[RowSource]) -> dict[str, Any]:
    """What a packed file says of one layer, as JSON values. `rows` must come from `parse_sources`."""
    recipe = [
        [
            [(s.offset, s.nbytes, s.shape, DTYPE_NAMES[s.dtype]) for s in piece.sources],
            [_describe_conversion(conversion) for conversion in piece.conversions],
        ]
        for source in rows
        for piece in source
    ]
    return {
        "experts": moe.num_experts,
        "fields": [
            {
                "name": f.name,
                "dtype": DTYPE_NAMES[f.dtype],
                "shape": list(f.shape),
                "offset": f.offset,
                "nbytes": f.nbytes,
            }
            for f in moe.layout.fields
        ],
        **({"elsewhere": {str(e): list(begins) for e, begins in moe.elsewhere.items()}} if moe.elsewhere else {}),
        "row_bytes": moe.layout.row_bytes,
        "recipe": hashlib.sha256(json.dumps([recipe, *(weight.recipe for weight in moe.packed)]).encode()).hexdigest(),
    }


def begins_of(described: Mapping[str, Any], moe: MoELayer) -> tuple[Begins, ...]:
    """Where the fields of each expert begin in plain transformers, which maps the checkpoint that was packed.

    Raises `ValueError`, `KeyError` or `TypeError` for what `describe_layer` does not write.
    """
    most = tuple(int(field["offset"]) % FIELD_ALIGN for field in described["fields"])
    begins = {int(e): tuple(map(int, found)) for e, found in described.get("elsewhere", {}).items()}
    fields = moe.unpacked.fields
    for one in (most, *begins.values()):
        if any(not 0 <= b < FIELD_ALIGN or b % f.dtype.itemsize for f, b in zip(fields, one, strict=True)):
            raise ValueError(f"fields cannot begin {list(one)} bytes past a line")
    return tuple(begins.get(e, most) for e in range(moe.num_experts))


def rows_metadata(model_type: str, layers: Mapping[str, Any]) -> str:
    """The metadata of a file with the experts of `layers`, `{layer name: its description}`."""
    return json.dumps(
        {
            "version": VERSION,
            "model_type": model_type,
            "transformers": version("transformers"),  # for people: what decides is the recipe
            "layers": dict(layers),
        }
    )


def sources_metadata(headers: Headers, keys: Iterable[str]) -> str:
    """Names, dtypes and shapes of the experts' tensors in the original checkpoint, grouped by the latter two."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key in sorted(keys):
        groups.setdefault((DTYPE_NAMES[headers[key].dtype], headers[key].shape), []).append(key)
    return json.dumps([[dtype, list(shape), names] for (dtype, shape), names in groups.items()])


def parse_sources(text: str) -> Headers:
    """The tensors that `sources_metadata` lists, one after the other in a file that does not exist.

    Raises `ValueError`, `KeyError` or `TypeError` for text that is not of that form.
    """
    headers = Headers()
    at = 0
    for name, sizes, keys in json.loads(text):
        shape, dtype = tuple(sizes), DTYPES[name]
        if any(type(n) is not int or n < 0 for n in shape) or any(type(key) is not str for key in keys):
            raise ValueError(f"not a shape and names: {sizes}, {keys[:1]}")
        nbytes = math.prod(shape) * dtype.itemsize
        for key in keys:
            headers[key] = TensorRange(NOWHERE, at, nbytes, shape, dtype)
            at += nbytes
    return headers


def _describe_conversion(conversion: Any) -> list[Any]:
    return [type(conversion).__name__, *dataclasses.astuple(conversion)]
