"""Letting a model be watched from outside its process: a snapshot of it, and a socket that hands snapshots out.

    snapshot   what one look sees
    server     the socket, a thread of the process of the model
    folder     where the sockets are

What looks at them is `apps/live`.
"""
