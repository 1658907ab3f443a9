"""Train, run and measure the ST-DiT-2 of Open-Sora 1.1."""
