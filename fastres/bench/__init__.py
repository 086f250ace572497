"""Measuring and verifying, shared by `fastres bench`, `fastres tune` and benchmarks/."""
