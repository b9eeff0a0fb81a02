"""Prompts that are not read twice: the KV caches of what was read and said, for requests that begin with it.

kv_slices.py  the beginning of a cache, and what it takes      cache.py   which are kept, and which gives way
open.py       what the flag says
folder.py     on disk, where asked                             model.py   what tells one model from another
"""
