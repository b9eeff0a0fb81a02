"""Decode steps that go past Dynamo's guards, where nothing that those read has changed since they last held.

steps.py      which steps: the last few kinds of step are kept, and tried first
kept.py       what one of them has relied on, and whether it still holds
guards.py     which guards that stands for: a search of Dynamo's tree
arguments.py  what its code then need not look up
"""
