"""What is done with a traced graph: its experts are found, it is rewritten and compiled, or only counted.

Nothing else imports `passes`. May import runtime and below.
"""
