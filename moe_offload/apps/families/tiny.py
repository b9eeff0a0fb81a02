"""A tiny random model of every MoE family in transformers, from the table of them (`table.py`).

model = build("qwen3_moe")                                # a few 100 KB, eval mode, the same weights every time
model = build("gpt_oss", dtype=torch.bfloat16, num_local_experts=16)
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from .family import Family, Kind
from .sizes import DEFAULT, SIZES
from .table import FAMILIES

# Standard deviation of every random matrix: activations neither die out nor explode over a few layers of width 64, in
# bfloat16 too, and a router spreads tokens over most of its experts.
STD = 0.1

# What the token embeddings are scaled by: as small as the rest, they drown in what the layers add, and greedy decoding
# soon repeats one token, whatever the experts compute.
EMBEDDING_GAIN = 4.0


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny model of `family` with weights drawn from `seed`, in eval mode.

    `overrides` are configuration fields, and win over the table's. The global random state is left as it was.
    """
    entry = FAMILIES[family]
    config = make_config(_load(entry.config_path), {**entry.overrides, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = _load(entry.model_path)._from_config(config, dtype=dtype)
        _keep_in_float32(model, dtype)
        if not next(model.parameters()).is_meta:
            _randomise(model, entry.kind)
    model.eval()
    return model


def make_config(cls: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of class `cls`: its own defaults, shrunk by `SIZES`, changed by `overrides`."""
    known = {field.name for field in dataclasses.fields(cls)}
    real_name = {name: name for name in known} | dict(cls.attribute_map)  # some fields go by a second name
    fields = {name: size for name, size in SIZES.items() if name in known}
    fields = {real_name[name]: size for name, size in SIZES.items() if name in real_name} | fields
    fields |= {real_name.get(name, name): value for name, value in overrides.items()}
    return cls(**{name: value for name, value in fields.items() if value is not DEFAULT})


def available_families() -> list[str]:
    """The families that the installed transformers has."""
    return [name for name, entry in FAMILIES.items() if _exists(entry)]


def unlisted_families() -> list[str]:
    """Folders of the installed transformers whose model dispatches through the experts interface, but has no entry."""
    listed = {entry.folder for entry in FAMILIES.values()}
    files = _models_folder().glob("*/modeling_*.py")
    return sorted({f.parent.name for f in files if "@use_experts_implementation" in f.read_text("utf-8")} - listed)


def _randomise(model: PreTrainedModel, kind: Kind) -> None:
    """Draw every matrix: classes start some of them constant, with which a wrong answer could look right."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape) * STD)
        if kind in ("lm", "encdec", "encoder"):
            embedding: Any = model.get_input_embeddings()
            embedding.weight.mul_(EMBEDDING_GAIN)
    for module in model.modules():
        if hasattr(module, "tid2eid"):
            _fill_hash_table(module)


def _fill_hash_table(router: Any) -> None:
    """Give each token id K different experts; a new model's table sends every token to expert 0."""
    table = router.tid2eid
    choice = torch.rand(table.shape[0], router.num_experts).argsort(dim=-1)
    table.copy_(choice[:, : table.shape[1]])


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make the parameters and buffers float32 that `from_pretrained` would keep so, for a model of `dtype`."""
    keep = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.bfloat16, torch.float16) else set()
    if dtype == torch.float16:
        keep |= set(model._keep_in_fp32_modules or ())
    pattern = re.compile("|".join(sorted(keep)) or r"(?!)")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and pattern.search(name):
            tensor.data = tensor.data.float()


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _exists(entry: Family) -> bool:
    """Whether the source defines both classes: reading it is much quicker than importing every family."""
    for path in (entry.config_path, entry.model_path):
        module, name = path.split(".")[-2:]
        source = _models_folder() / entry.folder / f"{module}.py"
        if not source.is_file() or f"\nclass {name}(" not in source.read_text("utf-8"):
            return False
    return True


def _models_folder() -> Path:
    return Path(transformers.__file__).parent / "models"
