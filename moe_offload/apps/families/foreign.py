"""Folders with code of their own: the class that a folder brings, tiny and random, run plain and offloaded.

No weights are needed: a folder is its config.json, whose sizes are shrunk by name, and the .py files that it names. The
reference is the class built by itself; each prompt is run whole, since older code keeps its cache in its own ways.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...api import optimize
from ...checkpoint.pretrained.arguments import Arguments
from ...checkpoint.pretrained.remote_code import find_remote_class
from ...checkpoint.pretrained.skeleton import read_configuration
from ...config.settings import OffloadConfig
from ...errors import ConfigError, OffloadError, UnsupportedModelError
from ...experts import find_experts
from ...plan.budget import budget_for
from ...plan.weights import layer_shapes, sum_costs
from .check import FamilyResult
from .sizes import DEFAULT, SIZES
from .tiny import STD

TRUSTED = Arguments(trust_remote_code=True)
PROMPTS = ((1, 16), (3, 33), (1, 1))  # sequences, tokens
RESIDENCIES = (0.0, 0.5, 1.0)


def find_folders(folder: Path) -> list[Path]:
    """`folder` or those in it whose config.json names code. Raises `ConfigError` where there are none."""
    found = [place for place in (folder, *sorted(folder.glob("*/"))) if _names_code(place / "config.json")]
    if not found:
        raise ConfigError(f"--foreign {folder}: no config.json in it, or in a folder of it, has an auto_map")
    return found


def check_foreign(folder: Path) -> FamilyResult:
    """Run the class of `folder` in both dtypes, at the floor, with half of the experts and with all."""
    model = _build(folder, torch.float32)
    name = type(model).__name__
    try:
        moe_layers = find_experts(model)
    except UnsupportedModelError as error:
        return FamilyResult(folder.name, "refused", str(error), name)
    facts = {"moe_layers": len(moe_layers), "experts": moe_layers[0].num_experts, "top_k": moe_layers[0].top_k}
    done = 0
    for dtype in (torch.float32, torch.bfloat16):
        want = _outputs(_build(folder, dtype))
        for residency in RESIDENCIES:
            got = _outputs(_offloaded(_build(folder, dtype), residency))
            if not all(itertools.starmap(torch.equal, zip(want, got, strict=True))):
                reason = f"{dtype}, {residency:.0%} resident: outputs differ"
                return FamilyResult(folder.name, "different", reason, name, **facts, cases=done)
            done += 1
    return FamilyResult(folder.name, "exact", "", name, **facts, cases=done)


def _build(folder: Path, dtype: torch.dtype) -> Any:
    config = read_configuration(folder, TRUSTED)
    for field, size in SIZES.items():
        if size is not DEFAULT and isinstance(getattr(config, field, None), int):
            setattr(config, field, size)
    model_class = find_remote_class(folder, config, TRUSTED)
    if model_class is None:
        raise OffloadError(f"{folder}: its auto_map names no AutoModelForCausalLM, so there is no class to try")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class._from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.copy_(torch.randn(parameter.shape) * STD)
    return model.eval()


def _offloaded(model: Any, residency: float) -> Any:
    settings, moe_layers = OffloadConfig(poison=True, kv_tokens=64, wave_rows=1), find_experts(model)
    budget = budget_for(residency, layer_shapes(moe_layers), sum_costs(model, moe_layers, settings))
    return optimize(model, budget, device_map="cpu", config=settings)


@torch.no_grad()
def _outputs(model: Any) -> list[Tensor]:
    found = []
    for sequences, tokens in PROMPTS:
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(3, model.config.get_text_config().vocab_size, (sequences, tokens), generator=generator)
        found.append(model(input_ids=ids, use_cache=False).logits.clone())
    return found


def _names_code(config: Path) -> bool:
    try:
        return "AutoModelForCausalLM" in json.loads(config.read_bytes())["auto_map"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
