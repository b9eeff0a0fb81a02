"""A process of its own that runs a tiny model and lets itself be watched, until its standard input ends.

Says its process id, then "running" after the first tokens; "closed" once it has closed the model, if told to by a line.
"""

import os
import select
import sys

import torch

from tests.fakes.offloaded import SETTINGS, offloaded, say

torch.set_num_threads(1)
model = offloaded(layers=2, config={**SETTINGS.changed(), "live": True})
print(os.getpid(), flush=True)
say(model)
print("running", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    say(model, n=5)
if sys.stdin.readline():
    model.moe_offload.close()
    print("closed", flush=True)
    sys.stdin.read()
