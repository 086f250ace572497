"""The benchmark suite: fastres against the peers that a PyTorch user would pick, every figure reproducible.

Run from the checkout: `python -m benchmarks --quick`. It imports fastres.bench, never the reverse.
"""
