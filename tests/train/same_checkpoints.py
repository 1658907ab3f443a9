"""Whether two checkpoints hold the same, bit for bit."""

import torch
from safetensors.torch import load_file


def assert_same_weights(first, second):
    """Weights, their average and the optimizer's state of two checkpoint folders."""
    for name in ("model/model.safetensors", "ema/model.safetensors", "optimizer.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)
