"""The T5 text encoder (transformers `T5EncoderModel` and its tokenizer)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from opensora_fast.device import send
from opensora_fast.pretrained import Need, find_folder, load_completely, locate_pretrained

from .captions import clean_caption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

    from . import TextEncoding

EXAMPLE = "DeepFloyd/t5-v1_1-xxl"
NEEDS = (
    Need("its configuration", ("config.json",)),
    Need("its weights", ("model*.safetensors", "pytorch_model*.bin")),
    Need("its tokenizer", ("spiece.model", "tokenizer.json")),
)


def find_weights(
    source: str | Path | None, cache_dir: str | None = None, local_files_only: bool = False
) -> Path | None:
    """The folder on this machine; None where it would be downloaded. ValueError if there is none, or files lack."""
    setting = "text_encoder.from_pretrained"
    return find_folder("text_encoder", setting, source, NEEDS, EXAMPLE, cache_dir, local_files_only)


class T5Encoder:
    """Captions to T5 embeddings, each caption padded or cut to `model_max_length` tokens.

    Args:
        model: the T5 encoder; it is frozen and set to eval mode.
        tokenizer: its tokenizer.
        model_max_length: L, tokens per caption, the end token included.
        clean_captions: apply `clean_caption` first, as the released ST-DiT-2 expects. Cleaning is done here and nowhere
            else.
    """

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        model_max_length: int = 120,
        clean_captions: bool = True,
    ):
        if model_max_length < 1:
            raise ValueError(f"text_encoder.model_max_length must be at least 1, got {model_max_length}")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"text_encoder: the tokenizer knows {len(tokenizer)} tokens, the model only {model.config.vocab_size}; "
                f"they do not belong together"
            )
        use_plain_norms(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.model_max_length = model_max_length
        self.clean_captions = clean_captions
        self.output_dim: int = model.config.d_model

    @classmethod
    def from_pretrained(
        cls,
        from_pretrained: str | Path | None = None,
        *,
        model_max_length: int = 120,
        shardformer: bool = False,
        clean_captions: bool = True,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> T5Encoder:
        """Loads a local folder or a hub id (see `locate_pretrained`).

        float16 overflows in T5 XXL; use bfloat16 or float32. `shardformer` is taken from Open-Sora's configurations,
        where it swaps in ColossalAI's layers and rounds the weights to float16; here the caller has chosen `dtype` by
        it, see `choose_text_dtype`.

        Raises:
            ValueError: the weights are not there or do not load.
        """
        if shardformer:
            warnings.warn(
                f"text_encoder.shardformer=True: no ColossalAI layers, T5 runs as transformers loads it, in {dtype}",
                stacklevel=2,
            )
        folder = locate_pretrained(
            "text_encoder",
            from_pretrained,
            NEEDS,
            example=EXAMPLE,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
            raise ValueError(
                f"text_encoder.from_pretrained: no tokenizer can be read in {folder}: {error!r}"
            ) from error
        # Read in the dtype it will have: 9.5 instead of 19 GB for T5 XXL in bfloat16.
        model = load_completely("text_encoder", T5EncoderModel, folder, local_files_only=True, dtype=dtype)
        return cls(model, tokenizer, model_max_length, clean_captions).to(device, dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> T5Encoder:
        """Moves the weights; transformers keeps some of them in float32 at loading, `dtype` reaches those too."""
        self.model.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextEncoding:
        """Embeddings of B captions.

        Returns:
            `y` [B, 1, L, C] of the encoder's device and dtype, `mask` [B, L] int64 on the CPU, 1 = a token of the
            caption (its end token included), 0 = padding.

        Raises:
            ValueError: no list of strings, or an empty one.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a non-empty list of strings, got {texts!r:.200}")
        tokens = self.tokenizer(
            [clean_caption(text) for text in texts] if self.clean_captions else list(texts),
            max_length=self.model_max_length,
            padding="max_length",
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"]
        embeddings = self.model(
            input_ids=send(tokens["input_ids"], self.device),
            attention_mask=send(make_attention_mask(mask, self.dtype), self.device),
        ).last_hidden_state
        return {"y": embeddings[:, None], "mask": mask}


def make_attention_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [B, L] as T5 takes it without a question that only the device can answer.

    transformers 5 asks whether every token is real, and the host waits for the answer, unless the mask is what is to be
    added to the logits [B, 1, 1, L]; transformers 4 makes that itself, and takes no other mask.
    """
    from transformers.models.t5 import modeling_t5

    if not hasattr(modeling_t5, "create_bidirectional_mask"):
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None]


class PlainT5Norm(nn.Module):
    """T5's norm: x / sqrt(mean(x²) + eps) with float32 statistics, rounded to the weight's dtype, times the weight."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        normalized = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(self.weight.dtype)


def use_plain_norms(model: nn.Module) -> int:
    """Replaces apex's norms in this model by `PlainT5Norm`; returns how many.

    transformers 4 takes apex's FusedRMSNorm for T5 as soon as apex can be imported. It rounds at another place, so the
    embeddings of one caption would depend on what else is installed.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__module__.split(".")[0] == "apex":
                setattr(parent, name, PlainT5Norm(child.weight, child.eps))
                replaced += 1
    return replaced
