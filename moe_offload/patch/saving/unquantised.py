"""Let a model whose weights were unpacked be saved as an ordinary one: transformers would save it as quantised still.

transformers (5.23) keeps the quantizer, the configuration and the conversions of the checkpoint that it unpacked. What
it then saves cannot be loaded: bfloat16 weights under the names of codes, or an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ...checkpoint.quantised.columns import is_packed_by

_ABSENT = object()


@contextlib.contextmanager
def as_unquantised(model: Any) -> Iterator[None]:
    """Inside the block transformers saves `model` as one that is not quantised. Others are left alone."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = getattr(model, "_weight_conversions", None) or []
    if not any(is_packed_by(getattr(entry, "operations", ())) for entry in conversions):
        yield
        return
    configs = {id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}
    places = [(model, "hf_quantizer"), (model, "is_quantized"), (model, "_weight_conversions")]
    places += [(config, "quantization_config") for config in configs.values()]
    kept = [(owner, name, vars(owner).pop(name, _ABSENT)) for owner, name in places]
    try:
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
        yield
    finally:
        for owner, name, value in kept:
            vars(owner).pop(name, None)
            if value is not _ABSENT:
                vars(owner)[name] = value
