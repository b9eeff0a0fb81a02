STRIP_BYTES=1<<20
def strips_are_exact(O,I,d): return False
def transposed_is_exact(O,I,d): return False
