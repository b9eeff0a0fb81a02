"""One step: expert ids in, rows moved, pairs computed.

Knows no graph and no transformers; `kernels/` takes the same decisions on the device. May import cache, memory,
observe and plan.
"""
