"""The contenders of a bench, each in a process of its own: ours, the resident model, accelerate, mmap."""
