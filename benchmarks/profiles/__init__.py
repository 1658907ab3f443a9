"""`opensora-fast profile`: attention over the attended length, and the kernels of a training step."""
