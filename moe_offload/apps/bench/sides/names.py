"""What the sides of a comparison are called, by device: known before torch is imported, which takes seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any

from ....errors import ConfigError
from ..architectures import PREFIX

LLAMA = "llama.cpp"
LLAMA_NEEDS = {"gguf": "gguf", "ik_llama_cpp": "ik-llama-cpp-python"}
GGUF_MODELS = ("qwen3-30b-a3b", "tiny")
#: What is compared where nothing is said.
DEFAULT = {
    "cpu": ("resident", "ours", "accelerate", "mmap"),
    "cuda": ("resident", "ours", "ours-host", "accelerate"),
}
NAMES = {**DEFAULT, "cpu": (*DEFAULT["cpu"], LLAMA)}


def check_sides(sides: Collection[str], device: str, measured: Collection[str]) -> None:
    """Raises ConfigError for a side that the device does not have, or wanted at a residency that is not measured."""
    known = NAMES[device]
    if not sides:
        raise ConfigError(f"--sides: there is nothing to measure; for --device {device} there are {', '.join(known)}")
    for named in sides:
        side, _, share = named.partition("@")
        if side not in known:
            raise ConfigError(f"--sides {side}: for --device {device} there are {', '.join(known)}")
        if share and share not in measured:
            raise ConfigError(f"--sides {named}: {share} is not among what is measured, {', '.join(measured)}")


def check_llama(model: str, experts: str | None, routing: Any) -> None:
    """Raises ConfigError where llama.cpp cannot be asked the same as the other sides, or is not installed."""
    if model not in [PREFIX + name for name in GGUF_MODELS] or experts == "fp8":
        raise ConfigError(
            f"--sides {LLAMA}: its GGUF file is written of {' or '.join(PREFIX + name for name in GGUF_MODELS)}, in "
            f"bfloat16, int4 or mxfp4, not of {model}{' in fp8' if experts == 'fp8' else ''}"
        )
    if routing is not None:
        raise ConfigError(
            f"--sides {LLAMA} chooses experts by the router in the file, and the others would follow --routing: leave "
            "out one of them. The routers of synthetic checkpoints have favourites of their own"
        )
    missing = [package for module, package in LLAMA_NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"--sides {LLAMA} needs packages that are not installed: pip install {' '.join(missing)}")
