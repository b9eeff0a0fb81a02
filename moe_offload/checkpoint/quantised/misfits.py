"""Files that hold something else than config.json says: refused by name, before anything is loaded.

transformers would fill what it does not recognise with random numbers, or take codes for weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ...packed.formats import place_of
from ...packed.fp8 import widen_scale
from ..headers import DTYPE_NAMES, Headers, TensorRange
from .quantizer import quantization_of

#: What the names of tensors end in that one method alone writes -> the method.
MARKS = {
    "_blocks": "MXFP4", ".weight_packed": "compressed-tensors", ".qweight": "GPTQ or AWQ", ".absmax": "bitsandbytes",
    "_qdata": "torchao", ".weight_scale_inv": "FP8",
}  # fmt: skip
#: Modules of bitsandbytes -> the tensor that stands beside each of their weights.
CODES_OF = {"Linear4bit": "weight.absmax", "Linear8bitLt": "SCB"}


def refuse_foreign(config: Any, headers: Headers, parameter: str) -> None:
    """Raise for a checkpoint without `parameter`, where experts of a quantised form are what it has instead."""
    for key, found in headers.items():
        method = _find_method(key)
        if method is not None and "expert" in key:
            raise UnsupportedModelError(
                f"{found.file}: {key!r} is a part of quantised experts ({method}), and config.json "
                f"{_quote_config(config)}, with which transformers has nothing for {parameter}. Put back the "
                "config.json that belongs to these files; if it is theirs, use a checkpoint in MXFP4, block FP8, "
                "compressed-tensors int4, or bfloat16"
            )


def refuse_codes(config: Any, headers: Headers, what: str, sources: Sequence[TensorRange], keys: Sequence[str]) -> None:
    """Raise for integers or one-byte floats where weights are expected: without scales they mean nothing."""
    for source, key in zip(sources, keys, strict=True):
        if source.dtype.itemsize == 1 or not source.dtype.is_floating_point:
            method = next(
                (_find_method(other) for other in headers if other.startswith(f"{key}.") and _find_method(other)), None
            )
            by = f" of {method}" if method else ""
            raise UnsupportedModelError(
                f"{source.file}: {key!r} holds {DTYPE_NAMES[source.dtype]} codes{by}, and config.json "
                f"{_quote_config(config)}, by which transformers cannot tell what {what} they stand for. Put back the "
                "config.json that belongs to these files; if it is theirs, use a checkpoint in a format that is read, "
                "or in bfloat16"
            )


def check_dense(model: Any, headers: Headers, experts: Collection[str]) -> None:
    """Raise for dense weights that are not of the form that the model of config.json has for them: FP8 codes of which
    nothing says what they are worth, and plain weights where the modules of bitsandbytes want codes."""
    _refuse_plain(model, headers)
    config = model.config
    said = quantization_of(config)
    for key, found in headers.items():
        if key in experts or found.dtype != torch.float8_e4m3fn or not key.endswith(".weight"):
            continue
        if said is None:
            raise UnsupportedModelError(
                f"{found.file}: {key!r} holds {DTYPE_NAMES[found.dtype]} codes, and config.json "
                f"{_quote_config(config)}. Put back the config.json that belongs to these files"
            )
        stem = key.removesuffix("weight")
        if not any(f"{stem}{end}" in headers for end in ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")):
            raise CheckpointError(
                f"{found.file}: {key!r} is {DTYPE_NAMES[found.dtype]} {list(found.shape)}, and the checkpoint has no "
                "scales for it. Download the missing shard, or the whole checkpoint again"
            )


def _refuse_plain(model: Any, headers: Headers) -> None:
    """transformers loads plain weights into modules of bitsandbytes, and their first call fails on an assertion."""
    for name, module in model.named_modules():
        mark = CODES_OF.get(type(module).__name__)
        found = headers.get(f"{name}.weight")
        if mark is not None and found is not None and f"{name}.{mark}" not in headers:
            raise CheckpointError(
                f"{found.file}: '{name}.weight' is {DTYPE_NAMES[found.dtype]} {list(found.shape)} without "
                f"'{name}.{mark}', and config.json {_quote_config(model.config)}: these files were not saved by it. "
                "Remove quantization_config if they are plain weights, or download the checkpoint again"
            )


def refuse_dense_faults(model: Any, headers: Headers, experts: Collection[str]) -> None:
    """Raise `CheckpointError` for dense codes or scales that mean no number, as `DiskStore` does for those of experts.

    `model` has been loaded: files are read again only where one of its weights is no number.
    """
    dense = {key: found for key, found in headers.items() if key not in experts}
    if not any(_is_scale(key) for key in dense) or all(_is_finite(param) for param in model.parameters()):
        return
    for key, found in dense.items():
        codes = found.dtype == torch.float8_e4m3fn
        if not codes and not _is_scale(key):
            continue
        tensor = headers.opened[found.file].get_tensor(key)
        wrong = ~torch.isfinite(widen_scale(tensor)) if _is_scale(key) else (tensor.view(torch.uint8) & 0x7F) == 0x7F
        place = place_of(wrong)
        if place is not None:
            raise CheckpointError(
                f"{found.file}: {key!r} at {list(place)} means no number. The checkpoint is damaged, or was made by "
                "something that does not keep to its format; download it again"
            )


def _is_scale(key: str) -> bool:
    return key.rpartition(".")[2] in ("weight_scale_inv", "weight_scale", "scale")


def _is_finite(param: Tensor) -> bool:
    """The sum is no number if any element is none: nothing as large as the weights is made."""
    return param.is_meta or not param.is_floating_point() or bool(torch.isfinite(param.sum(dtype=torch.float32)))


def _quote_config(config: Any) -> str:
    said = quantization_of(config)
    if said is None:
        return "names no format (quantization_config)"
    method = said.get("quant_method") if isinstance(said, Mapping) else getattr(said, "quant_method", None)
    return f"says {getattr(method, 'value', method)} (quantization_config)"


def _find_method(key: str) -> str | None:
    return next((method for end, method in MARKS.items() if key.endswith(end)), None)
