"""Which clips train together: the buckets of Open-Sora, the micro-batches of an epoch, and their order."""
