"""Triton kernels of attention.

`spatial_…`, `temporal_…` and `cross_…` belong to the op of that name one folder up, which holds the formula, the
reference and what the kernels are told. They stand on `loops`, `tiles`, `rotary_tiles` and the host's `tables`.
"""
