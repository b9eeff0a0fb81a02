"""Text in, text out, at a terminal: run and chat."""
