"""Who may import whom. Reads the imports of every file, those inside functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Layer:
    """Modules that may import each other and those of the layers above them in the list."""

    name: str
    modules: str
    never: frozenset[str] = frozenset()


TORCH_FREE = frozenset({"torch", "transformers", "accelerate", "safetensors"})

#: Lowest first. A file is in the first layer that names it.
LAYERS = [
    Layer(
        "words",
        "errors version sizes checkpoint_folder config config_file config_rules profile profile_stats profile_show "
        "typical cache belady placement stats new_folder whole_file npz trace recorder timeline chrome_trace "
        "strict_json simulate simulate.* report report.record report.advice report.charts report.page report.png "
        "policies policies.* live live.snapshot live.folder live.server live.client live.rates live.screen",
        never=TORCH_FREE,
    ),
    Layer(
        "parts",
        "experts arrange explain progress buffers process_memory scratch arrivals feed overlap groups trial checkpoint "
        "conversion rows packed packed_format shards new_checkpoint plan measure transfer stores stores.* kernels "
        "kernels.* device_cache transfer_threads transfer_device dense replay",
    ),
    Layer("runtime", "layer_runtime runtime prewarm assemble"),
    Layer("engine", "backend handle live.take metrics notebook advise loading outline open_stores pack_streams"),
    Layer("model", "install call steps links retry kv_state shrink saving refusals record pack forecasting"),
    Layer("api", "api"),
    Layer(
        "front",
        "cli cli.* record_texts report.collect bench bench.* families families.* quickstart quickstart.* "
        "serving serving.*",
    ),
    Layer("package", "__init__ __main__"),
]

#: Graph rewriting and what serves the rewritten graph never meet; one file introduces them to each other.
MAY_IMPORT_PASSES = {"moe_offload.backend"}


def files() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for package in ("passes", "moe_offload"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(module: str, source: str, *, is_package: bool, known: set[str]) -> set[str]:
    """The modules that `source` imports, absolute. `from a import b` is module a.b where there is one, else a."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else str(node.module)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found


def layer_of(module: str) -> int | None:
    """The index in LAYERS, or None for a file that nobody has placed."""
    name = module.partition(".")[2] or "__init__"
    placed = (i for i, layer in enumerate(LAYERS) if any(fnmatchcase(name, p) for p in layer.modules.split()))
    return next(placed, None)


def violations(module: str, imported: set[str]) -> list[str]:
    """What this file imports and must not, each with the reason."""
    outside = {name for name in imported if name.partition(".")[0] not in {*sys.stdlib_module_names, "__future__"}}
    if module.partition(".")[0] == "passes":
        alien = sorted(name for name in outside if name.partition(".")[0] not in {"passes", "torch"})
        return [f"{module} imports {name}: passes knows torch and itself, nothing else" for name in alien]

    own = layer_of(module)
    if own is None:
        return [f"{module} is in no layer: add it to LAYERS in {Path(__file__).name}, as low as its imports allow"]
    wrong = []
    for name in sorted(outside):
        top = name.partition(".")[0]
        if top == "moe_offload":
            other = layer_of(name)
            if other is not None and other > own:
                wrong.append(f"{module} ({LAYERS[own].name}) imports {name} ({LAYERS[other].name}), which is above it")
        elif top == "passes" and module not in MAY_IMPORT_PASSES:
            wrong.append(f"{module} imports {name}: only {', '.join(sorted(MAY_IMPORT_PASSES))} may")
        elif top in LAYERS[own].never:
            wrong.append(f"{module} imports {name}: the layer {LAYERS[own].name!r} runs without {top}")
        if module.startswith("moe_offload.policies.") and not name.startswith("moe_offload.policies"):
            wrong.append(f"{module} imports {name}: a policy uses the standard library only")
    return wrong


@pytest.mark.parametrize(("module", "path"), files().items(), ids=files())
def test_layers(module, path):
    imported = imports(module, path.read_text(), is_package=path.name == "__init__.py", known=set(files()))
    assert not violations(module, imported), "\n".join(violations(module, imported))


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("passes.find", "import transformers", "nothing else"),
        ("passes.find", "from moe_offload.errors import ConfigError", "nothing else"),
        ("passes.find", "import numpy", "nothing else"),
        ("moe_offload.config", "import torch.fx", "runs without torch"),
        ("moe_offload.cache", "def f():\n    from torch import Tensor", "runs without torch"),
        ("moe_offload.cache", "from .runtime import x", "above it"),
        ("moe_offload.cache", "from . import runtime", "above it"),
        ("moe_offload.stores.disk", "from ..api import optimize", "above it"),
        ("moe_offload.stores.disk", "from .. import optimize", "above it"),
        ("moe_offload.policies.lru", "import numpy", "standard library only"),
        ("moe_offload.policies.lru", "from ..errors import ConfigError", "standard library only"),
        ("moe_offload.runtime", "import passes.ops", "only moe_offload.backend may"),
        ("moe_offload.runtime", "from ..passes import ops", "only moe_offload.backend may"),
        ("moe_offload.api", "from passes import run", "only moe_offload.backend may"),
        ("moe_offload.backend", "from .api import optimize", "above it"),
        ("moe_offload.surprise", "", "add it to LAYERS"),
        ("moe_offload.surprise.inner", "", "add it to LAYERS"),
    ],
)
def test_a_violation_is_found(module, source, reason):
    known = {"moe_offload", "moe_offload.runtime", "passes", "passes.ops"}
    (found,) = violations(module, imports(module, source, is_package=False, known=known))
    assert reason in found and module in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("passes.find", "import torch, operator\nfrom . import ops\nfrom .core import Core"),
        ("moe_offload.config", "import os\nimport pydantic\nfrom .errors import ConfigError"),
        (
            "moe_offload.stores.disk",
            "import torch\nfrom safetensors import safe_open\nfrom ..errors import OffloadError",
        ),
        ("moe_offload.backend", "import passes\nfrom .runtime import Runtime\nfrom passes import ops"),
        ("moe_offload.families.x", "import transformers\nfrom .. import api"),
        ("moe_offload", "from .api import optimize"),
    ],
)
def test_what_is_allowed_is_allowed(module, source):
    known = {"moe_offload.api", "moe_offload.runtime", "passes.ops"}
    assert violations(module, imports(module, source, is_package=module == "moe_offload", known=known)) == []


@pytest.mark.skipif(not (ROOT / "moe_offload" / "__init__.py").exists(), reason="the package has no front door yet")
def test_import_is_light():
    program = (
        "import sys, threading, moe_offload\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'\n"
        "assert threading.enumerate() == [threading.main_thread()], f'threads: {threading.enumerate()}'\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized(), 'CUDA was started'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
