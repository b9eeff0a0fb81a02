"""Where rows are and how they move: files, RAM, staging, slots.

`stores/` are the places where rows rest, `transfer/` is movement. Only here are files and streams open while a model
runs. May import checkpoint and observe (the timeline); never decides which row goes where.
"""
