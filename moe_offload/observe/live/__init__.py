"""Watching a model from outside: a snapshot of it, a socket that hands it out, and what looks at it.

take -> snapshot -> server       in the process of the model
folder                           where the sockets are
client -> rates -> screen        in the process that looks (moe-offload top)
"""
