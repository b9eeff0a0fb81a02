"""A checkpoint folder whose model exists only as the code in it: `fakes/loops`, saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tests.fakes import loops
from tests.fakes.loop_models import build

CODE = Path(loops.__file__).parent
FILES = ("configuration_loops.py", "modeling_loops.py")
AUTO_MAP = {"AutoConfig": "configuration_loops.LoopsConfig", "AutoModelForCausalLM": "modeling_loops.LoopsForCausalLM"}


def write_remote(folder: Path, loop: str = "hits", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Save the model of `build(loop)` there, with its code; `changes` are of config.json."""
    build(loop, dtype).save_pretrained(folder)
    for name in FILES:
        shutil.copyfile(CODE / name, folder / name)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "auto_map": AUTO_MAP, **changes}))
    return folder
