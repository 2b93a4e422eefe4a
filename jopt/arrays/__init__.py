"""One array in, arrays out; only jax.numpy, no technique.

In reading order: `axes` (reshapes that stay on their devices), `counts` (numbers of
elements, whatever the size), `scans` (reads of one array), `selection` (the exact k
largest without sorting), `patterns` (which elements go together), `packing` (bits to
bytes), `formats` (what a code can mean), `rounding`, `specs` (which elements share a
scale), `scales`, `codes`, `straight_through` (gradients), `quantized` (the array that
carries codes and scales).
"""
