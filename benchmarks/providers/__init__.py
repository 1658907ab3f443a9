"""Implementations that the benchmarks compare."""
