"""A checkpoint folder whose model exists only as the code in it: `fakes/loops`, saved."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch

from tests.fakes import loops
from tests.fakes.loop_models import build

CODE = Path(loops.__file__).parent
FILES = ("configuration_loops.py", "modeling_loops.py")
AUTO_MAP = {"AutoConfig": "configuration_loops.LoopsConfig", "AutoModelForCausalLM": "modeling_loops.LoopsForCausalLM"}


@functools.cache
def keep_code_apart() -> None:
    """transformers copies code that it runs to a folder, for good: here one that goes with this process. It must stay
    the same throughout: Python finds the code of all tests in the package that it was first imported from."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, dynamic_module_utils.HF_MODULES_CACHE, ignore_errors=True)


def write_remote(folder: Path, loop: str = "hits", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Save the model of `build(loop)` there, with its code; `changes` are of config.json."""
    keep_code_apart()
    build(loop, dtype).save_pretrained(folder)
    for name in FILES:
        shutil.copyfile(CODE / name, folder / name)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "auto_map": AUTO_MAP, **changes}))
    return folder
