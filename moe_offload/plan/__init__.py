"""What fits where: bytes in, slots and tiers out. Nothing is loaded.

May import config, checkpoint and memory's facts about devices; never a running model.
"""
