"""Products whose sums are kept in 64 lanes, as torch adds them up without oneDNN: the same bits, many times as fast."""
