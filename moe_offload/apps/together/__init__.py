"""Several `generate` calls of one model at once, in one thread and exactly: what they read is read for all of them.

turn.py      what is asked for
turns.py     who computes when: steps begin together, and wait for each other before the experts of each layer
member.py    one of them: a greenlet, with random numbers of its own
"""
