"""What looks at running models: `moe-offload top`. What they show is in `observe/live`, on sockets.

    cli -> client -> rates -> screen

It imports no torch: it starts at once, and does not compete with the model that it watches.
"""
