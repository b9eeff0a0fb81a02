"""Checkpoints whose weights are quantised: which are read, and how an expert's tensors become packed weights.

methods        what config.json says, and what is refused for it; no torch
quantizer      transformers' own quantizer, which says how names and tensors become parameters
recognise      the format of one matrix, from the dtypes and shapes of its tensors
columns        one parameter of every expert of a layer: which of its tensors lie in a row, and how it is made of them
weights        a parameter that rests as the file's tensors, unpacked where it is used
verify         our unpacking against transformers' own, when a model is loaded; wrapped, fused_weight: other ways to
compute blocks         FP8 blocks that do not divide their matrix, and those of another size than config.json says
misfits        files that hold something else than config.json says layouts        the other direction: which tensors
are written when an ordinary checkpoint is quantised

May import `packed/` and what the rest of `checkpoint/` may; never slots or a running model.
"""
