"""Configurations of kernels, tables of measured times, and the command that measures them."""
