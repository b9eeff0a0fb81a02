"""Who may import whom. Reads the imports of every file, those inside functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Lowest first: a room (a folder, or a file beside the folders) imports from rooms before it in this list, and itself.
ROOMS = "errors files cache config experts checkpoint observe memory plan runtime forward handle patch pack record api"
ROOMS = [*ROOMS.split(), "apps", "__main__", "__init__"]
TORCH_FREE = {"errors", "files", "cache", "config"}  # what counts or is said needs no model
HEAVY = {"torch", "transformers", "accelerate", "safetensors"}
MOST_FILES = 11  # in one folder, its __init__ not counted


def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    paths = [path for package in ("passes", "moe_offload") for path in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sorted(paths)}


def imported_by(module: str, source: str, known: set[str], is_package: bool = False) -> set[str]:
    """The modules that `source` imports, absolute. `from a import b` is module a.b where there is one, else a."""
    package, found = module if is_package else module.rpartition(".")[0], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def violations(module: str, imported: set[str]) -> list[str]:
    """What this file imports and must not, each with the reason."""
    outside = {name for name in imported if name.partition(".")[0] not in {*sys.stdlib_module_names, "__future__"}}
    if module.partition(".")[0] == "passes":
        alien = sorted(name for name in outside if name.partition(".")[0] not in {"passes", "torch"})
        return [f"{module} imports {name}: passes knows torch and itself, nothing else" for name in alien]
    if room_of(module) not in ROOMS:
        return [f"{module} is in no room: add {room_of(module)!r} to ROOMS, as low as its imports allow"]
    floor, wrong = ROOMS.index(room_of(module)), []
    for name in sorted(outside):
        top = name.partition(".")[0]
        if top == "moe_offload" and name not in modules():  # mypy takes it for a package without types
            wrong.append(f"{module} imports {name}, which is not there")
        elif top == "moe_offload" and room_of(name) in ROOMS and ROOMS.index(room_of(name)) > floor:
            if not (room_of(module) == "apps" and name == "moe_offload"):  # apps come in by the front door
                wrong.append(f"{module} imports {name}, which is in a room above it")
        elif top == "passes" and not module.startswith("moe_offload.forward.graphs."):
            wrong.append(f"{module} imports {name}: only moe_offload.forward.graphs may")
        elif top in HEAVY and room_of(module) in TORCH_FREE:
            wrong.append(f"{module} imports {name}: the room {room_of(module)!r} runs without it")
        elif room_of(module) == "cache" and top != "moe_offload":
            wrong.append(f"{module} imports {name}: the cache and its policies use the standard library only")
    return wrong


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=modules())
def test_no_arrow_runs_up(module, path):
    imported = imported_by(module, path.read_text(), set(modules()), is_package=path.name == "__init__.py")
    assert not violations(module, imported), "\n".join(violations(module, imported))


def test_no_circle():
    """Between files, so neither between rooms nor inside one."""
    known, graph = modules(), {}
    for module, path in known.items():
        package = path.name == "__init__.py"
        graph[module] = imported_by(module, path.read_text(), set(known), is_package=package) & set(known) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(f"these import each other: {' -> '.join(circle.args[1])}")


def test_no_room_is_crowded():
    folders = {path.parent for module, path in modules().items() if module.startswith("moe_offload")}
    crowded = {str(f.relative_to(ROOT)): len(list(f.glob("*.py"))) - 1 for f in folders}
    crowded = {folder: files for folder, files in crowded.items() if files > MOST_FILES}
    assert not crowded, f"more than {MOST_FILES} files: {crowded}"


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("passes.find", "import transformers", "nothing else"),
        ("passes.find", "from moe_offload.errors import ConfigError", "nothing else"),
        ("passes.find", "import numpy", "nothing else"),
        ("moe_offload.config.settings", "import torch.fx", "runs without"),
        ("moe_offload.cache.layer_cache", "def f():\n    from torch import Tensor", "runs without"),
        ("moe_offload.cache.layer_cache", "from ..runtime.layer import x", "above it"),
        ("moe_offload.cache.layer_cache", "from ..runtime import layer", "above it"),
        ("moe_offload.cache.lru", "import numpy", "standard library only"),
        ("moe_offload.cache.lru", "from ..config.settings import OffloadConfig", "above it"),
        ("moe_offload.memory.stores.disk", "from ...api import optimize", "above it"),
        ("moe_offload.memory.stores.disk", "from ... import optimize", "above it"),
        ("moe_offload.runtime.layer", "import passes.ops", "only moe_offload.forward.graphs may"),
        ("moe_offload.api", "from passes import run", "only moe_offload.forward.graphs may"),
        ("moe_offload.forward.regions", "import passes", "only moe_offload.forward.graphs may"),
        ("moe_offload.forward.graphs.compiling", "from ...api import optimize", "above it"),
        ("moe_offload.api", "from .apps.cli import main", "above it"),
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
