"""Reads of what nobody has asked for yet: into slots by a guess, into scratch for the next layer of a prompt."""
