"""Watching a model from outside: a snapshot of it, a socket that hands it out, and what looks at it.

    in the process of the model          take.py -> snapshot.py -> server.py
    where the sockets are                folder.py
    in the process that looks            client.py -> rates.py -> screen.py        (moe-offload top)
"""
