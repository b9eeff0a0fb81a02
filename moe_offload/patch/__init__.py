"""What is changed in the user's model, and what is refused from then on.

May import forward and below; `api.py` calls it once, and closing takes everything back.
"""
