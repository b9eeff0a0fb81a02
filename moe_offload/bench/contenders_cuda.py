"""The sides of the comparison on a GPU.

resident     transformers' own from_pretrained, moved there; its static KV cache makes generate() compile decode steps
             with CUDA graphs
ours         dense weights and slots on the GPU, the other rows in RAM, and the GPU decides
ours-host    the same, and the host decides: a cache that is managed from outside, over the same rows
accelerate   device_map="auto" with the budget on the GPU and the rest in RAM: whole modules come over the link
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import ConfigError
from ..experts import find_experts
from ..loading import skeleton
from . import contenders
from .contenders import PACKED

STATIC = {"cache_implementation": "static"}  # what generate() is told, on a GPU
SETTINGS = {"untested": True, "compile": "inductor", "policy": "decayed_lfu"}


def refuse_absent(device: str) -> None:
    """Raise `ConfigError` for a device that the bench does not know, or that is not here."""
    if device not in SIDES_ON:
        raise ConfigError(f"--device {device}: there are {', '.join(SIDES_ON)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: torch {torch.__version__} finds no CUDA device here (torch.cuda.is_available() is False); "
            "leave --device out to measure on the CPU"
        )


def rows_in_ram(folder: Path) -> dict[str, str | int]:
    """The device map of `ours`: everything on the first GPU, rows of experts in RAM."""
    return {"": 0, **{bank.name: "cpu" for bank in find_experts(skeleton(folder))}}


def resident(folder: Path, budget: int, scratch: Path) -> Any:
    return contenders.resident(folder, budget, scratch).to("cuda")


def ours(folder: Path, budget: int, scratch: Path, decide: str = "device") -> Any:
    from ..api import from_pretrained

    packed = scratch / PACKED
    return from_pretrained(
        packed if packed.exists() else folder,
        budget,
        device_map=rows_in_ram(folder),
        config={**SETTINGS, "decide": decide},
    )


def ours_host(folder: Path, budget: int, scratch: Path) -> Any:
    return ours(folder, budget, scratch, decide="host")


def accelerate(folder: Path, budget: int, scratch: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map="auto",
        max_memory={0: budget, "cpu": psutil.virtual_memory().available},
    ).eval()


#: Device -> its sides, in the order in which they are measured. What is mapped from a file has no meaning on a GPU.
SIDES_ON: dict[str, dict[str, Callable[[Path, int, Path], Any]]] = {
    "cpu": contenders.SIDES,
    "cuda": {"resident": resident, "ours": ours, "ours-host": ours_host, "accelerate": accelerate},
}
