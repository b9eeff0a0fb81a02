"""llama.cpp as a side of the bench: the synthetic checkpoint as a GGUF file, and the process that answers with it."""
