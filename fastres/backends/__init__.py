"""One file per family of kernels: its candidates and its launchers."""
