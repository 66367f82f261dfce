"""Triton ops, one a file: mathematics, kernels, launches; how they are registered and allocated."""
