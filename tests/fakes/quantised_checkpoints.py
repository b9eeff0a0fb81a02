"""Quantised checkpoints as the table of families writes them (apps/families/quantised/), and damaged or cut up.

write("fp8", folder)                     # config.json and one safetensors file; plain transformers loads it
load(folder, 0.5)                        # offloaded, with slots for half of the experts
rewrite(folder, lambda tensors: ...)     # the same with other tensors
split(folder, lambda key: ...)           # the same in two files
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import moe_offload
from moe_offload import OffloadConfig
from moe_offload.apps.families.quantised import kinds
from moe_offload.apps.families.quantised.kinds import KINDS, save
from moe_offload.checkpoint.outline import outline_folder
from moe_offload.plan.budget import budget_for
from moe_offload.plan.weights import layer_shapes, sum_costs


def write(kind: str, folder: Path, **sizes: Any) -> Path:
    """The checkpoint of that kind in `folder`, which is made; `sizes` are fields of the model's configuration."""
    return kinds.write(KINDS[kind], folder, **sizes)


def load(folder: Path, residency: float, config: OffloadConfig, device: str = "cpu", **options: Any) -> Any:
    """The offloaded model of a checkpoint, with slots for that part of its experts on `device`."""
    found = outline_folder(folder)
    costs = sum_costs(found.model, found.moe_layers, config, device)
    budget = budget_for(residency, layer_shapes(found.moe_layers), costs)
    return moe_offload.from_pretrained(folder, budget, config=config, **options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = tensors_of(folder)
    change(tensors)
    save(folder, tensors)
    return folder


def split(folder: Path, second: Callable[[str], bool]) -> Path:
    """The same in two shards: tensors whose name is `second` lie in the second."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    where = {key: f"model-0000{2 if second(key) else 1}-of-00002.safetensors" for key in tensors}
    for name in set(where.values()):
        save(folder, {key: tensor for key, tensor in tensors.items() if where[key] == name}, name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
