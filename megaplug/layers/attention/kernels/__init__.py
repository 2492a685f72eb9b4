"""Kernels that compute attention of one block of rows, a family in each file; ``block_kernels`` chooses."""
