"""moe-offload env."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import typer

from ... import __version__
from ...config.settings import active_file, find_origins, resolve_settings
from ...config.sizes import format_size
from ...errors import ConfigError, ProfileError
from ...memory.machine import main_memory
from ..options.flags import ConfigFile, Json

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "triton")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TORCH_LOGS")


def env(config_file: ConfigFile = None, as_json: Json = False) -> None:
    """What a bug report needs: versions, machine, and the settings in force with where each comes from."""
    facts = {**_machine(), "packages": _packages(), "settings": _settings(config_file), "variables": _variables()}
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, fact in facts.items():
        if isinstance(fact, dict):
            typer.echo(f"{name}:")
            for key, value in fact.items():
                told = f"{value['value']!s:<24}  {value['from']}" if name == "settings" and "from" in value else value
                typer.echo(f"  {key:<24}{told}")
        else:
            typer.echo(f"{name:<26}{format_size(fact) if name.endswith('_bytes') else fact}")


def _machine() -> dict[str, Any]:
    memory, disk = main_memory(), shutil.disk_usage(Path.cwd())
    return {
        "moe_offload": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_bound_by": memory.bound,
        "free_memory_bytes": memory.free,
        "free_disk_bytes": disk.free,
        "gpu": _gpu(),
    }


def _cpu() -> str:
    """What the processor is called; platform.processor() is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu() -> str:
    """The GPUs that torch can use. Importing it takes seconds; it is asked because a driver alone proves nothing."""
    try:
        import torch
    except Exception as error:  # an installation that is broken is what the report is about
        return f"torch cannot be imported: {type(error).__name__}: {error}"
    if not torch.cuda.is_available():
        return "none that torch can use" + (f" (built for CUDA {torch.version.cuda})" if torch.version.cuda else "")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{one.name}, {format_size(one.total_memory)}" for one in names) + f", CUDA {torch.version.cuda}"


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _settings(config_file: Path | None) -> dict[str, Any]:
    """Each setting with where it comes from; if they cannot be read, why: that is what the report may be about."""
    try:
        found, where = resolve_settings(config_file), find_origins(config_file)
    except (ConfigError, ProfileError) as error:
        return {"error": str(error)}
    file = active_file(config_file)
    read = {"value": None if file is None else str(file), "from": "read" if file else "there is none"}
    values = {name: {"value": value, "from": where[name]} for name, value in found.to_dict().items()}
    return {"file": read, **values}


def _variables() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ} | {"executable": sys.executable}
