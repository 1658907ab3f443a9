"""A text encoder that needs no download: bytes as tokens, a small T5 encoder with fixed random weights.

A caption's bytes are mixed by random attention, so equal captions get equal embeddings and similar ones similar
embeddings. It knows nothing of language; a model trained with it learns to tell its captions apart.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import TYPE_CHECKING

import torch

from .t5 import T5Encoder

if TYPE_CHECKING:
    from transformers import ByT5Tokenizer


class ByteTextEncoder(T5Encoder):
    """T5 encoder over UTF-8 bytes (`ByT5Tokenizer`), its frozen weights drawn from `seed`.

    The weights depend on the arguments alone, not on torch's generator or the version of transformers.
    """

    def __init__(
        self,
        model_max_length: int = 120,
        output_dim: int = 64,
        depth: int = 2,
        seed: int = 0,
        clean_captions: bool = True,
    ):
        from transformers import T5Config, T5EncoderModel

        if output_dim < HEAD_SIZE or output_dim % HEAD_SIZE:
            raise ValueError(f"text_encoder.output_dim must be a multiple of {HEAD_SIZE}, got {output_dim}")
        if depth < 1:
            raise ValueError(f"text_encoder.depth must be at least 1, got {depth}")
        tokenizer = _make_tokenizer()
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=output_dim,
            d_kv=HEAD_SIZE,
            d_ff=2 * output_dim,
            num_layers=depth,
            num_heads=output_dim // HEAD_SIZE,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten below
            model = T5EncoderModel(config)
        _draw_weights(model, seed)
        super().__init__(model, tokenizer, model_max_length, clean_captions)

    @classmethod
    def from_pretrained(
        cls,
        *,
        model_max_length: int = 120,
        output_dim: int = 64,
        depth: int = 2,
        seed: int = 0,
        clean_captions: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ByteTextEncoder:
        """The encoder of these settings; there is nothing to load."""
        return cls(model_max_length, output_dim, depth, seed, clean_captions).to(device, dtype)


HEAD_SIZE = 16


@cache
def _make_tokenizer() -> ByT5Tokenizer:
    """Without state, and longer in the making than a small model."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter from its own generator, seeded by `seed` and the parameter's name."""
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        # Embeddings of unit size; matrices that keep the size of what goes through them. T5 does not divide attention
        # logits by the root of the head size, so the queries do.
        scale = 1.0
        if parameter.ndim == 2 and "shared" not in name and "embed_tokens" not in name:
            scale = parameter.shape[1] ** -0.5
        if name.endswith("SelfAttention.q.weight"):
            scale *= HEAD_SIZE**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
