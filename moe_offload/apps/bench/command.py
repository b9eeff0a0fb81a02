"""Make the bench's workload of the command line's flags: the model, the budgets, the routing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...checkpoint.outline import Outline, outline_folder
from ...checkpoint.pretrained.arguments import Arguments
from ...checkpoint.pretrained.download import get_folder
from ...errors import CheckpointError, ConfigError, ReportError
from ...files.whole_file import save_whole
from ...plan.budget import budget_for
from ...plan.forecast import make_plan
from .architectures import PREFIX
from .devices import DEVICES
from .routing import check_replayable
from .sides.contenders import room_for
from .sides.gpu_contenders import settings_of_ours
from .synthetic import default_cache, make_synthetic
from .workload import Workload


def make_workload(
    model: str,
    *,
    device: str,
    budget: str | None,
    residency: Sequence[float],
    layers: int | None,
    routing: Path | None,
    prompt: Path | None,
    cache: Path | None,
    packed: bool,
    experts: str | None = None,
    trust_remote_code: bool = False,
    **amounts: int,
) -> Workload:
    """Raises `ConfigError` for settings that contradict each other, and what loading and planning raise."""
    DEVICES[device]().check()
    if packed and device != "cpu":
        raise ConfigError("--packed is for rows that are read from disk; on a GPU they rest in RAM")
    of_its_own = model.startswith(PREFIX)
    trusted = Arguments(trust_remote_code=trust_remote_code)
    folder = (
        make_synthetic(model.removeprefix(PREFIX), layers, cache, experts) if of_its_own else get_folder(model, trusted)
    )
    outline = outline_folder(folder, trusted)
    if routing is not None:
        check_replayable(outline.moe_layers)
    ids = _prompt_ids(folder, prompt, amounts["prompt_tokens"], trust_remote_code) if prompt is not None else None
    tokens = (len(ids) if ids else amounts["prompt_tokens"]) + amounts["new_tokens"]
    names = [moe.name for moe in outline.moe_layers]
    config = room_for(tokens) if device == "cpu" else settings_of_ours(names, tokens, "device")
    if budget is None:
        whole = make_plan(folder, 2**60, config=config, trust_remote_code=trust_remote_code)
        budgets = {f"{share * 100:g}%": str(budget_for(share, whole.layers, whole.costs)) for share in residency}
    else:
        budgets = {budget: budget}
    planned = {
        asked: make_plan(folder, budget, config=config, trust_remote_code=trust_remote_code)
        for asked, budget in budgets.items()
    }
    return Workload(
        folder,
        planned,
        outline.model.config.get_text_config().vocab_size,
        device,
        str(routing) if routing else None,
        prompt=ids,
        packed=packed,
        forced=of_its_own,
        touched_bytes=_touched_bytes(outline),
        trust_remote_code=trust_remote_code,
        **amounts,
    )


def _touched_bytes(outline: Outline) -> int:
    """What one decoded token computes with: all dense weights but the table of embeddings, and a few rows a layer."""
    model = outline.model
    inside = tuple(f"{name}." for moe in outline.moe_layers for name in moe.names)
    dense = {id(p): p.nbytes for name, p in model.named_parameters() if not name.startswith(inside)}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        dense.pop(id(embeddings.weight), None)
    return sum(dense.values()) + sum(moe.top_k * moe.layout.row_bytes for moe in outline.moe_layers)


def scratch_folder(cache: Path | None) -> Path:
    folder = cache or default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prompt_ids(folder: Path, file: Path, tokens: int, trusted: bool) -> Sequence[int]:
    from ..generate.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trusted)
        ids: list[int] = tokenizer(file.read_text(encoding="utf-8"))["input_ids"][:tokens]
    except (OSError, ValueError, CheckpointError) as error:
        raise ConfigError(f"--file {file}: cannot be read and tokenised: {error}") from error
    if not ids:
        raise ConfigError(f"--file {file}: it is empty")
    return ids


def write_json(result: dict[str, Any], file: Path) -> None:
    """Write the result, whole or not at all, so that a run that is cut short leaves its last one. Raises
    `ReportError`."""
    save_whole(file, (json.dumps(result, indent=1) + "\n").encode(), "result", ReportError)
