"""How one case is measured: its providers are checked against float64, then timed in turns with cold caches."""
