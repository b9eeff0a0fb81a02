"""Checkpoints whose weights are quantised: which are read, and how an expert's tensors become packed weights.

methods     what config.json says, and what is refused for it; no torch
quantizer   transformers' own quantizer, which says how names and tensors become parameters
recognise   the format of one matrix, from the dtypes and shapes of its tensors
blocks      FP8 blocks that do not divide their matrix, and those of another size than config.json says
misfits     files that hold something else than config.json says
weights     a parameter that rests as the file's tensors, unpacked where it is used
"""
