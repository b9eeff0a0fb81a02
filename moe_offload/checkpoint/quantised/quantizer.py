"""transformers' own quantizer for a checkpoint: asked how tensors become parameters, and never to compute.

On a machine with a GPU it would keep the weights as they are, and compute in another arithmetic. Here a model is the
same one on every device, so that the quantizer is told to dequantise.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ...errors import UnsupportedModelError

#: The methods that take `dequantize`; experts of the others are dequantised in any case.
TOLD_TO_DEQUANTIZE = ("mxfp4", "fp8", "mxfp8")


def settle_quantization(config: Any) -> None:
    """Where the text part of a configuration has it, put it where transformers looks first; ask to dequantise."""
    found = quantization_of(config)
    if found is None:
        return
    said = dict(found) if isinstance(found, dict) else found.to_dict()
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method")))
    config.quantization_config = said | ({"dequantize": True} if method in TOLD_TO_DEQUANTIZE else {})


def quantization_of(config: Any) -> Any:
    """What a configuration, or its text part, says of quantisation; None where it says nothing."""
    found = getattr(config, "quantization_config", None)
    return found or getattr(config.get_text_config(decoder=True), "quantization_config", None) or None


def prepare_quantized(model: Any) -> None:
    """Let `model`, on the meta device, be as transformers has it before it loads weights; `model.hf_quantizer` is set.

    Raises `UnsupportedModelError` where a package is missing, or the quantizer wants another device.
    """
    said = quantization_of(model.config)
    if said is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("cpu"):  # a package that is imported now makes tables of its own, and not on meta
                quantizer = AutoHfQuantizer.from_config(said, pre_quantized=True)
            if hasattr(quantizer.quantization_config, "dequantize"):  # dense weights too: so they will be held
                quantizer.quantization_config.dequantize = True
            quantizer.validate_environment(device_map=None, weights_only=True)
            quantizer.preprocess_model(model, dtype=model.dtype, device_map=None, checkpoint_files=None)
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"transformers cannot prepare this quantised checkpoint: {str(error).splitlines()[0][:300]}"
        ) from error
    model.hf_quantizer = quantizer


def unpack_dense(model: Any) -> None:
    """Unpack now what the package compressed-tensors would unpack in the first forward: the same weights, and they are
    in the plan. In a forward it would also take over every module's parameters, those of the experts too."""
    if not hasattr(model, "ct_decompress_hook"):
        return
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.utils import is_module_quantized

    compressor = model.hf_quantizer.compressor
    for module in model.modules():
        if is_module_quantized(module):
            decompress_module(module, compressor.force_compression_format)
    if compressor.quantization_config is not None:
        compressor.quantization_config.quantization_status = QuantizationStatus.DECOMPRESSED
    compressor.remove_decompression_hook(model)
