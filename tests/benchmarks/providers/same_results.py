"""Comparison of results by name."""

from opensora_fast.benchmarks.measuring.accuracy import distance, norm


def assert_same(results, expected, limit=2e-6):
    for name, value in expected.items():
        assert distance(results[name], value) <= limit * max(norm(value), 1e-3), name
