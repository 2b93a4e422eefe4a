"""Speed and memory, measured: each file prints a table and writes JSON.

    python -m experiments.benchmarks.NAME --out FILE.json

Ours and the peer run alternately in one process; medians and ratios are reported, with
the hardware and the versions beside them.
"""
