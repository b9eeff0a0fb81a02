"""What a model has done: counted (profile), recorded (trace, timeline), shown (metrics, notebook, live).

Reads counters and takes no lock. May import files, config, cache and experts; never the runtime, never the handle:
`watched.py` says what is asked of it.
"""
