"""`moe-offload bench`: this package beside the resident model, accelerate's offload and plain mmap, in one run.

run.py         the order of things: which sides, inside which budgets, which of them alive together
sides/         side.py: a process that holds one side; turns.py: they answer in turn, beside the roof;
               contenders.py: how each loads the model; limit.py: memory of a process, and the most it has held
request.py     one request: a prompt of P tokens, then D greedy tokens, timed through `generate`
routing.py     recorded expert ids in place of the router's choice
synthetic.py   checkpoints of real architectures with random weights
roofs/         what cannot be beaten: bounds.py; of the disk: disk.py; of the link to a GPU: link.py
devices.py     what is asked of a CPU or a GPU: to settle, and how much memory is held
result.py      figures as plain JSON values; table.py: as a person reads them
"""
