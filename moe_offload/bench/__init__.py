"""`moe-offload bench`: this package beside the resident model, accelerate's disk offload and plain mmap, in one run.

run.py         the order of things: start the sides, alternate them, put the roofs beside them, compare
side.py        a process that holds one side: it loads, answers requests, and says what they took
contenders.py  how each side loads the model; contenders_cuda.py: on a GPU
request.py     one request: a prompt of P tokens, then D greedy tokens, timed through `generate`
routing.py     recorded expert ids in place of the router's choice
synthetic.py   checkpoints of real architectures with random weights
roofs.py       what the disk itself gives; link.py: what the link to a GPU gives
limit.py       memory: a cgroup around a process, and the most it has held, on a GPU too
table.py       the figures as a person reads them
"""
