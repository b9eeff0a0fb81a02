"""Formats of quantised checkpoints, each tried with families that are published in it.

codes   weights as the tensors of each format
kinds   tiny checkpoints of each
check   one of them in plain transformers and offloaded: equal to the bit, or refused with the reason
page    the table of them, and where it stands in the documentation
"""
