"""How each side of the comparison loads the model on a GPU. Each runs in a process of its own (`side.py`).

resident     transformers' own, the whole model on the GPU; generate() compiles its decode steps to CUDA graphs
ours         moe_offload inside the budget, all rows in pinned RAM, the device decides: a decode step is one CUDA graph
ours-host    the same rows, budget and policy, but the host decides: it hears each layer's ids, and no step is a graph
accelerate   device_map="auto" with max_memory={0: budget, "cpu": the rest}: layers cross the link when they compute
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil

from ....checkpoint.outline import outline_folder
from ....checkpoint.pretrained.dense import load_whole
from ....checkpoint.pretrained.own_class import is_own
from ....runtime.assemble import DEVICE_POLICY
from .contenders import Contender, Job, room_for

#: What makes generate() compile: a KV cache that stays where it is.
STATIC_CACHE = {"cache_implementation": "static"}


def settings_of_ours(experts: Sequence[str], tokens: int, decide: str) -> dict[str, Any]:
    """Ours on GPU 0, with room for a KV cache of `tokens` tokens; `experts` are the names of the experts modules."""
    return {
        "device_map": {"": 0, **dict.fromkeys(experts, "cpu")},
        "decide": decide,
        "policy": DEVICE_POLICY,
        "untested": True,
        **room_for(tokens),
    }


def load_resident(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    found = outline_folder(job.folder, job.arguments) if job.trust_remote_code else None
    if found is not None and is_own(found.model):
        return load_whole(found).to("cuda:0")
    return AutoModelForCausalLM.from_pretrained(job.folder, dtype="auto", device_map={"": 0}, **job.code).eval()


def load_ours(job: Job) -> Any:
    return _load_ours(job, "device")


def load_ours_host(job: Job) -> Any:
    return _load_ours(job, "host")


def load_accelerate(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    limits = {0: job.budget, "cpu": psutil.virtual_memory().available}
    model = AutoModelForCausalLM.from_pretrained(
        job.folder, dtype="auto", device_map="auto", max_memory=limits, **job.code
    )
    return model.eval()


GPU_SIDES = {
    "resident": Contender(load_resident, STATIC_CACHE),
    "ours": Contender(load_ours, STATIC_CACHE),
    "ours-host": Contender(load_ours_host, STATIC_CACHE),
    "accelerate": Contender(load_accelerate),  # what it moves about cannot be compiled
}


def _load_ours(job: Job, decide: str) -> Any:
    from ....api import from_pretrained

    names = [moe.name for moe in outline_folder(job.folder, job.arguments).moe_layers]
    return from_pretrained(job.folder, job.budget, config=settings_of_ours(names, job.tokens, decide), **job.code)
