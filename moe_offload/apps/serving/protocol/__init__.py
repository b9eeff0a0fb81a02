"""OpenAI's completions and chat completions as they go over the wire: fields in, answers, events and errors out.

Imports the names of `generation.py` (Sampling, Piece); no thread, socket or queue comes in here.
"""
