"""A model whose experts are modules that its own loop calls: code as it comes with a checkpoint, in two files.

`configuration_loops.py` and `modeling_loops.py` are copied into a folder to make a checkpoint with remote code.
"""
