"""From a table of clips to batches: manifest, buckets, sampler, decoders, loader."""

from opensora_fast.data.buckets.bucket import Bucket

__all__ = ["Bucket"]
