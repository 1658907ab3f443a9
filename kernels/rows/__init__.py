"""Triton kernels that work row by row: norms, gates, GELU, QK-norm with rotary embedding, and sums over their tiles.

The ops one folder up hold the formulas, the references and what the kernels are told.
"""
