"""What a step computes from: the table in its buckets, batches of clips or features, and encoders for them."""
