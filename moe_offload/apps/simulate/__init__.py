"""Replay traces through the runtime's cache: which policy hits how often at which capacity, beside Belady's roof.

    rows = simulate([Trace.load("run.npz")], ["lru", "default", "belady"], ["25%"])

Event-atomic, as the runtime is: a forward asks a layer for all its experts at once, hits are counted against what was
resident before, and no victim was asked for. `run` tells the story, `plain` is the reference and `fast` its compiled
twin, `show` makes the table, the JSON and the plot.
"""
