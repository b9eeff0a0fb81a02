"""What runs when the model is called: trace, rewrite, compile, run, and try again when memory was short.

Only `backend.py` imports `passes`. May import runtime and below; never changes the user's model.
"""
