"""Ways to fewer tokens: each runs a model's blocks on them, ``reduction(blocks, x, readout, rope) -> tokens``."""
