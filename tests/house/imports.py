"""The modules of both packages, and what each imports, inside functions and under TYPE_CHECKING too."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.paths import ROOT


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


def import_graph() -> dict[str, set[str]]:
    """What each module imports, of the packages themselves and of others."""
    known = modules()
    return {
        module: imported_by(module, path.read_text(), set(known), is_package=path.name == "__init__.py") - {module}
        for module, path in known.items()
    }


def room_of(module: str) -> str:
    """The folder, or the file beside the folders, in which a module of moe_offload lies."""
    return module.split(".")[1] if "." in module else "__init__"
