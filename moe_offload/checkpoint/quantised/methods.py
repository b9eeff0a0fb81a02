"""Which quantised checkpoints are read, by what their config.json says; all others are refused by name. No torch.

What is read is what plain transformers dequantises into the model's own experts on a CPU: its bits can be had from the
packed tensors alone. What plain transformers loads wrongly, or not at all, has nothing to be equal to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import UnsupportedModelError

#: Methods whose experts are read packed.
PACKED = ("mxfp4", "fp8", "mxfp8", "compressed-tensors")
#: Methods that quantise dense layers alone; an expert that carries their marks is refused when the headers are read.
DENSE_ONLY = ("bitsandbytes",)

_RANDOM = "transformers would fill the experts with random numbers: it quantises nn.Linear, and they are none"
_INSTEAD = "use a checkpoint in MXFP4, block FP8, compressed-tensors int4 or FP8, or the bfloat16 original"
#: Method -> why not.
REFUSED = {
    "gptq": _RANDOM,
    "awq": _RANDOM,
    "auto-round": _RANDOM,
    "hqq": "transformers 5 has not brought it back yet",
    "quanto": "it quantises while loading, and has no form on disk",
    "torchao": "what its tensors mean stands in the files' metadata, which transformers reads by their path alone",
    "nvfp4": "transformers does not load experts that were quantised to it before",
    "fbgemm_fp8": "it computes on CUDA alone, with kernels of its own",
    "eetq": "it computes on CUDA alone, with kernels of its own",
    "higgs": "it computes on CUDA alone, with kernels of its own",
    "fp_quant": "it computes on CUDA alone, with kernels of its own",
    "quark": "its layers are those of the package amd-quark, which the passes do not know",
}


def check_quantization(place: Path | str, config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModelError` where a configuration asks for quantised weights that are not read."""
    for where, found in find_quantizations(config):
        said = found if isinstance(found, Mapping) else getattr(found, "__dict__", {})
        method = said.get("quant_method")
        name = str(getattr(method, "value", method) or "no method named")
        why = _why_not(name, said)
        if why is not None:
            raise UnsupportedModelError(
                f"{place}: the checkpoint is quantised ({name}; {where} in its config.json), and that is not read: "
                f"{why}. Instead, {_INSTEAD}"
            )


def find_quantizations(config: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Each quantisation that a configuration states, with its place in it: of the whole, or of any part.

    transformers looks at the whole and at the text part. What it does with another part is not certain, so that counts.
    """
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value is not None:
            yield f"{inside}{key}", value
        elif isinstance(value, Mapping) and str(key).endswith("_config"):
            yield from find_quantizations(value, f"{inside}{key}.")


def _why_not(method: str, said: Mapping[str, Any]) -> str | None:
    if method == "compressed-tensors":
        groups = said.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            return "it has no config_groups, which say how the weights are packed"
        found = (_why_no_group(said.get("format"), group) for group in groups.values())
        return next((why for why in found if why is not None), None)
    if method in (*PACKED, *DENSE_ONLY):
        return None
    return REFUSED.get(method, "nothing is known of it here")


def _why_no_group(form: Any, group: Any) -> str | None:
    """Why a group of compressed-tensors is not read: what transformers 5.23 loads wrongly, or fails to load."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return "a config group says nothing of its weights"
    form = str(group.get("format") or form)
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if "nvfp4" in form:
        return "transformers leaves out the global scale of NVFP4, and computes with weights far too large"
    if form == "mxfp4-pack-quantized":
        return None
    if weights.get("actorder") not in (None, False, "static", "weight"):
        return f"activation ordering ({weights['actorder']!r}) is not undone"
    if kind == "int" and form == "pack-quantized" and bits == 4 and strategy in ("group", "channel"):
        return None if weights.get("symmetric", True) else "transformers cannot load asymmetric integers into experts"
    if kind == "float" and bits == 8 and strategy in ("channel", "tensor"):
        return None
    return f"{bits}-bit {kind} weights by {strategy} ({form}) are not what transformers can load into experts"
