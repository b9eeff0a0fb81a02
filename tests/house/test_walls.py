"""What a room never imports: the graph passes know torch only, what counts or is said needs no torch."""

from __future__ import annotations

import sys

import pytest

from tests.house.imports import import_graph, imported_by, modules, room_of
from tests.house.test_rooms import ROOMS

TORCH_FREE = {"errors", "files", "cache", "config"}  # what counts or is said needs no model
HEAVY = {"torch", "transformers", "accelerate", "safetensors"}


def violations(module: str, imported: set[str]) -> list[str]:
    """What this file imports and must not, each with the reason."""
    outside = {name for name in imported if name.partition(".")[0] not in {*sys.stdlib_module_names, "__future__"}}
    if module.partition(".")[0] == "passes":
        alien = sorted(name for name in outside if name.partition(".")[0] not in {"passes", "torch"})
        return [f"{module} imports {name}: passes knows torch and itself, nothing else" for name in alien]
    if room_of(module) not in ROOMS:
        return [f"{module} is in no room: add {room_of(module)!r} to ROOMS, as low as its imports allow"]
    wrong = []
    for name in sorted(outside):
        top = name.partition(".")[0]
        if top == "moe_offload" and name not in modules():  # mypy takes it for a package without types
            wrong.append(f"{module} imports {name}, which is not there")
        elif top == "passes" and not module.startswith("moe_offload.forward.graphs."):
            wrong.append(f"{module} imports {name}: only moe_offload.forward.graphs may")
        elif top in HEAVY and room_of(module) in TORCH_FREE:
            wrong.append(f"{module} imports {name}: the room {room_of(module)!r} runs without it")
        elif room_of(module) == "cache" and top != "moe_offload":
            wrong.append(f"{module} imports {name}: the cache and its policies use the standard library only")
    return wrong


def test_nothing_crosses_a_wall():
    found = [reason for module, imported in import_graph().items() for reason in violations(module, imported)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("passes.find", "import transformers", "nothing else"),
        ("passes.find", "from moe_offload.errors import ConfigError", "nothing else"),
        ("passes.find", "import numpy", "nothing else"),
        ("moe_offload.config.settings", "import torch.fx", "runs without"),
        ("moe_offload.cache.layer_cache", "def f():\n    from torch import Tensor", "runs without"),
        ("moe_offload.cache.lru", "import numpy", "standard library only"),
        ("moe_offload.runtime.layer", "import passes.ops", "only moe_offload.forward.graphs may"),
        ("moe_offload.api", "from passes import run", "only moe_offload.forward.graphs may"),
        ("moe_offload.forward.backend", "import passes", "only moe_offload.forward.graphs may"),
        ("moe_offload.forward.call", "from .no_such_file import x", "which is not there"),
        ("moe_offload.surprise", "", "in no room"),
        ("moe_offload.surprise.inner", "", "in no room"),
    ],
)
def test_a_violation_is_found(module, source, reason):
    found = violations(module, imported_by(module, source, set(modules())))
    assert len(found) == 1 and reason in found[0] and module in found[0], found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("passes.find", "import torch, operator\nfrom . import ops\nfrom .core import Core"),
        ("moe_offload.config.settings", "import os\nimport pydantic\nfrom ..errors import ConfigError"),
        ("moe_offload.memory.stores.disk", "import torch\nfrom safetensors import safe_open\nfrom ...errors import X"),
        (
            "moe_offload.forward.graphs.compiling",
            "import passes\nfrom ...runtime.model import Runtime\nfrom passes import ops",
        ),
        ("moe_offload.apps.families.check", "import transformers\nfrom ... import api, optimize"),
        ("moe_offload", "from .api import optimize"),
    ],
)
def test_what_is_allowed_is_allowed(module, source):
    assert violations(module, imported_by(module, source, set(modules()), is_package=module == "moe_offload")) == []
