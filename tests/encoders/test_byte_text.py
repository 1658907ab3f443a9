"""The byte encoder: deterministic everywhere, different for different captions."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opensora_fast.encoders import build_text_encoder
from opensora_fast.encoders.byte_text import ByteTextEncoder

CAPTIONS = ["a dog runs", "A dog runs", "a cat runs", "the sea at night, very long " * 9, ""]

CONFIG = {"type": "bytes", "model_max_length": 40}


def fingerprint() -> str:
    """Hash of the weights and of two embeddings."""
    encoder = build_text_encoder(CONFIG)
    tensors = [*encoder.model.parameters(), encoder.encode(["a dog runs", "b"])["y"]]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def test_shapes():
    encoder = build_text_encoder({"type": "bytes", "model_max_length": 40, "output_dim": 32, "depth": 1})
    encoding = encoder.encode(CAPTIONS)
    assert encoding["y"].shape == (5, 1, 40, 32) and encoder.output_dim == 32
    assert encoding["mask"].dtype == torch.int64 and encoding["mask"].device.type == "cpu"
    assert encoding["mask"].sum(1).tolist() == [11, 11, 11, 40, 1]  # a token per byte and the end token
    assert encoding["y"].isfinite().all()


def test_equal_captions_are_equal_and_others_differ():
    y = build_text_encoder(CONFIG).encode(CAPTIONS)["y"]
    assert torch.equal(y[0], y[1])  # cleaning lowers the case
    means = y[:, 0, :11].mean(1)
    assert (means[0] - means[2]).norm() > 0.1 * means[0].norm()


def test_a_byte_is_seen_by_its_neighbors():
    """The embedding of a byte depends on the rest of the caption: attention mixes them."""
    y = build_text_encoder({"type": "bytes", "model_max_length": 16}).encode(["dog a", "dig a"])["y"][:, 0]
    assert (y[0, 0] - y[1, 0]).norm() > 1e-3 * y[0, 0].norm()


def test_the_same_in_another_process_and_whatever_the_seed():
    torch.manual_seed(1)
    code = "import test_byte_text, torch; torch.manual_seed(2); print(test_byte_text.fingerprint())"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == fingerprint()


def test_building_leaves_the_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ByteTextEncoder()
    assert torch.equal(torch.rand(3), expected)


def test_seed_changes_the_weights():
    first, second = (ByteTextEncoder(40, seed=seed).encode(["a dog"])["y"] for seed in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("keys", [{"output_dim": 20}, {"output_dim": 0}, {"depth": 0}, {"model_max_length": 0}])
def test_wrong_settings_are_refused(keys: dict):
    with pytest.raises(ValueError, match=next(iter(keys))):
        build_text_encoder({"type": "bytes"} | keys)
