"""What happens when the device runs out of memory in a forward: give slots back, put the KV cache back, run it again.

`retry.py` decides, `shrink.py` makes the banks smaller, `kv_undo.py` takes back what the failed forward had written.
"""
