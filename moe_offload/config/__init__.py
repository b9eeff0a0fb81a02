"""What a user may say: settings, sizes, device maps, and which source wins.

May import errors, files and the table of policies; never torch or a model. Only `settings.py` reads the environment.
"""
