"""From what a person typed to a workload: the model, the budget, the routing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..api import make_plan
from ..errors import ConfigError
from ..loading import resolve_folder, skeleton
from ..plan import budget_for
from .contenders_cuda import refuse_absent, rows_in_ram
from .synthetic import PREFIX, default_cache, synthetic
from .workload import Workload


def workload(
    model: str,
    *,
    budget: str | None,
    residency: float | None,
    layers: int | None,
    routing: Path | None,
    prompt: Path | None,
    cache: Path | None,
    packed: bool,
    device: str,
    **amounts: int,
) -> Workload:
    """Raises `ConfigError` for settings that contradict each other, and what loading and planning raise."""
    if (budget is None) == (residency is None):
        raise ConfigError("give either --budget (8GB) or --residency (25%), one of them")
    if layers is not None and not model.startswith(PREFIX):
        raise ConfigError(f"--layers is for {PREFIX}NAME; {model} has the layers it has")
    refuse_absent(device)
    if routing is not None and not routing.is_file():
        raise ConfigError(f"--routing {routing}: no such file")
    folder = synthetic(model.removeprefix(PREFIX), layers, cache) if model.startswith(PREFIX) else resolve_folder(model)
    where = None if device == "cpu" else rows_in_ram(folder)
    if residency is not None:
        whole = make_plan(folder, 2**60, device_map=where)
        budget = str(budget_for(residency, whole.layers, whole.costs))
    vocabulary = skeleton(folder).config.get_text_config().vocab_size
    ids = _prompt_ids(folder, prompt, amounts["prompt_tokens"]) if prompt is not None else None
    trace = str(routing) if routing else None
    plan = make_plan(folder, budget, device_map=where)
    return Workload(folder, plan, vocabulary, trace, prompt=ids, packed=packed, device=device, **amounts)


def scratch_folder(cache: Path | None) -> Path:
    folder = cache or default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prompt_ids(folder: Path, file: Path, tokens: int) -> Sequence[int]:
    from transformers import AutoTokenizer

    try:
        ids: list[int] = AutoTokenizer.from_pretrained(folder)(file.read_text())["input_ids"][:tokens]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompt {file}: cannot be read and tokenised: {error}") from error
    if not ids:
        raise ConfigError(f"--prompt {file}: it is empty")
    return ids


def write_json(result: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(result, indent=1) + "\n")
