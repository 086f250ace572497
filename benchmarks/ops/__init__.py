"""The public ops as cases, one a file, named as in kernels/, fastres/ops/ and tests/."""
