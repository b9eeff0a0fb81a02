"""Files read as hostile input, and written whole or not at all.

No torch, nothing of ours. Raises ValueError and OSError: whoever calls names the file's meaning and the remedy.
"""
