"""What tells a model apart from every other whose KV caches could be taken for its own: one wrong cache, and the tokens
are wrong without a word.

Of each dense weight a part is looked at (all of gigabytes would take longer than to read a prompt), of experts the
names, sizes and times of their files; and what rounds keys and values: versions, dtype, attention, settings.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import transformers

from ... import __version__
from ...errors import ConfigError

FORMAT = 1  # of the files in a folder of caches
SAMPLED = 1024  # elements of each dense weight


def identify_model(model: Any, compute: str) -> str:
    """A hash of `model`, which is offloaded and computes as the setting `compute` says.

    Raises `ConfigError` where experts are not read from files, and so are known by nothing.
    """
    handle = model.moe_offload
    if not handle.files:
        raise ConfigError(
            "--prompt-cache FOLDER: the experts rest in main memory here, so nothing tells them from those of another "
            "model; leave --max-memory out, or the folder"
        )
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
    known: list[Any] = [FORMAT, __version__, torch.__version__, transformers.__version__]
    known += [str(model.dtype), attention, compute, handle.compile, handle.implementation]
    known += [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in handle.files]
    found = hashlib.blake2b(json.dumps([known, config], sort_keys=True, default=str).encode(), digest_size=16)
    experts = {id(tensor) for moe in handle.moe_layers for tensor in moe.tensors}
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        if id(tensor) not in experts and tensor.numel():
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // SAMPLED)].contiguous()
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
