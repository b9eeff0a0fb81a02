"""python -m tests.fakes.generated_child FAMILY [lookahead]: the code that Inductor generates for a GPU from the decode
step of a small model with a static KV cache, and what it knows of its inputs, as one line of JSON. FAMILY may be the
kind of a quantised checkpoint, whose experts' rows are packed."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moe_offload.apps.families.quantised.kinds import KINDS
from moe_offload.forward.graphs import compiling, small_kernels
from passes import ops
from tests.fakes.fake_gpu import compile_kernels, generate_code
from tests.fakes.offloaded import IDS, SETTINGS, offload, resident
from tests.fakes.quantised_checkpoints import load, write


def main(family, *settings):
    found = []
    with pytest.MonkeyPatch.context() as patch:

        def inner(gm, inputs):
            if any(node.target in ops.PLACES for node in gm.graph.nodes):
                options = {**compiling.CUDA_GRAPH, **small_kernels.options()}
                with small_kernels.both_kinds_together():
                    found.append(generate_code(gm, inputs, options, patch))
            return gm.forward

        patch.setattr(compiling, "run_graph", inner)
        patch.setattr(compiling, "is_on_gpu", lambda bank_SN: True)
        patch.setattr(compiling, "joins_gates", lambda inner: True)  # which is Inductor's code generation
        device = replace(SETTINGS, decide="device", poison=False, dynamic=None, **dict.fromkeys(settings, True))
        if family in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                model = load(write(family, Path(folder) / "model"), 0.5, config=device, device_map="cpu", profile="off")
        else:
            plain = resident(family, layers=3 if family == "deepseek_v3" else 2)  # whose first one has no experts
            model = offload(plain, 0.5, config=device, device_map="cpu", profile="off")
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, cache_implementation="static")
        layers = len(model.moe_offload.moe_layers)
        kernels = compile_kernels(found[0].code, patch)
    one = {name: sorted(x) if isinstance(x, set) else x for name, x in asdict(found[0]).items()}
    print(json.dumps({"graphs": len(found), "layers": layers, "kernels": kernels, **one}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
