"""`moe-offload bench`: this package beside the resident model, accelerate's offload and plain mmap, in one run.

run.py         the order of things: which sides, inside which budgets, which of them alive together
turns.py       sides that answer in turn, with the roof measured beside each answer
side.py        a process that holds one side: it loads, answers requests, and says what they took
contenders.py  how each side loads the model on a CPU; gpu_contenders.py: on a GPU
request.py     one request: a prompt of P tokens, then D greedy tokens, timed through `generate`
routing.py     recorded expert ids in place of the router's choice
synthetic.py   checkpoints of real architectures with random weights
roofs.py       what the disk itself gives; link.py: the link to a GPU
devices.py     what is asked of a CPU or a GPU: to settle, and how much memory is held
limit.py       memory of a process: a cgroup around it, and the most it has held
bounds.py      what cannot be beaten, and how near ours comes
result.py      figures as plain JSON values; table.py: as a person reads them
"""
