"""Configuration of ST-DiT-2, with upstream's key names."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from opensora_fast.suggest import suggest

# Keys that the released config.json files hold and that say nothing about the computation.
IGNORED_KEYS = {
    "_attn_implementation_autoset": "note of transformers 4.46 and later on its own attention",
    "_name_or_path": "name of the repository the file came from",
    "architectures": "class name of upstream's implementation",
    "auto_map": "names upstream's code files, which are never executed",
    "dtype": "storage type of the weights, read from the weights themselves",
    "model_type": "registry name of upstream's implementation",
    "torch_dtype": "storage type of the weights, read from the weights themselves",
    "transformers_version": "version that wrote the file",
}

# Keys of upstream that choose its implementation; here `use_kernels` and the backend choose, and results do not change.
IMPLEMENTATION_KEYS = (
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
)


class STDiT2Config(BaseModel):
    """Shape and options of an ST-DiT-2.

    Keys are upstream's; an unknown key is an error that names the nearest known one.

    Attributes:
        input_size: unused by the model (any size is taken); kept because released files hold it.
        input_sq_size: side in pixels of the square that position coordinates are scaled to.
        in_channels: latent channels.
        patch_size: (1, p, p): a token is one frame's p·p latent pixels.
        hidden_size: C.
        depth: blocks.
        num_heads: attention heads; head size is hidden_size / num_heads.
        mlp_ratio: hidden size of the MLP over hidden_size.
        class_dropout_prob: probability that training replaces a caption by the stored unconditional one.
        pred_sigma: whether variance coefficients are predicted too (output channels doubled).
        drop_path: must be 0, as in every configuration of Open-Sora 1.1.
        no_temporal_pos_emb: must be False, as in every configuration of Open-Sora 1.1.
        caption_channels: width of the text embeddings.
        model_max_length: L, text tokens that a caption is padded to.
        freeze: None, "not_temporal" (train temporal attention only) or "text" (cross-attention is not trained).
        qk_norm: RMS norm of queries and keys in self-attention.
        upstream_rounding: round timesteps, sizes, rotary angles and the frequencies of positions to the model's dtype
            before they are used, as Open-Sora 1.1 does and as its released weights were trained; False keeps them in
            float32. The same in a float32 model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    input_size: tuple[int | None, int | None, int | None] = (None, None, None)
    input_sq_size: int = 32
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    no_temporal_pos_emb: bool = False
    caption_channels: int = 4096
    model_max_length: int = 120
    freeze: Literal["not_temporal", "text"] | None = None
    qk_norm: bool = False
    upstream_rounding: bool = True

    def __init__(self, **keys: Any):
        known = type(self).model_fields
        for key in list(keys):
            if key in known:
                continue
            if key in IMPLEMENTATION_KEYS:
                if keys.pop(key):
                    warnings.warn(f"{key}: not used; the kernels are chosen by `use_kernels`", stacklevel=2)
            elif key == "qk_norm_legacy":
                if not keys.pop(key) and keys.get("qk_norm"):
                    raise ValueError(
                        "STDiT2Config: qk_norm_legacy=False is another model, which normalizes queries and keys before "
                        "it rotates them; Open-Sora 1.1's, and its weights, need True"
                    )
            elif key in IGNORED_KEYS:
                keys.pop(key)
            else:
                hint = suggest(key, [*known, *IMPLEMENTATION_KEYS])
                raise ValueError(f"STDiT2Config: unknown key {key!r}; {hint}")
        try:
            super().__init__(**keys)
        except ValidationError as error:
            mistakes = [
                ": ".join([*map(str, item["loc"]), item["msg"].removeprefix("Value error, ")])
                for item in error.errors()
            ]
            raise ValueError(f"STDiT2Config: {'; '.join(mistakes)}") from None

    @field_validator("patch_size")
    @classmethod
    def _one_frame_square_patch(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if value[0] != 1 or value[1] != value[2] or value[1] < 1:
            raise ValueError(f"patch_size {value} is not supported; use (1, p, p) as Open-Sora 1.1 does")
        return value

    @field_validator("drop_path")
    @classmethod
    def _no_drop_path(cls, value: float) -> float:
        if value != 0:
            raise ValueError(f"drop_path {value} is not supported; Open-Sora 1.1 trains with 0")
        return value

    @field_validator("no_temporal_pos_emb")
    @classmethod
    def _rotary_stays(cls, value: bool) -> bool:
        if value:
            raise ValueError("no_temporal_pos_emb=True is not supported; upstream's 1.1 model ignores it")
        return value

    @model_validator(mode="after")
    def _sizes_fit(self) -> STDiT2Config:
        sizes = ("input_sq_size", "in_channels", "hidden_size", "depth", "num_heads", "caption_channels")
        for name in (*sizes, "model_max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % 12:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be divisible by 3 (size embedding) and by 4 (position)"
            )
        if self.hidden_size % self.num_heads or self.head_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be an even head size")
        if not 1 <= self.hidden_size * self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} must give the MLP at least one hidden channel")
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in 0 … 1, got {self.class_dropout_prob}")
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        return self.in_channels * 2 if self.pred_sigma else self.in_channels

    @classmethod
    def xl_2(cls, **keys: Any) -> STDiT2Config:
        """STDiT2-XL/2 of Open-Sora 1.1: 767.5 M parameters, with the options of the released weights."""
        return cls(**({"input_sq_size": 512, "qk_norm": True, "model_max_length": 200} | keys))

    @classmethod
    def small(cls, **keys: Any) -> STDiT2Config:
        """A model of the same head size (72) for tests and the demo: hidden 144, 2 heads, depth 2."""
        small = {
            "hidden_size": 144,
            "num_heads": 2,
            "depth": 2,
            "input_sq_size": 512,
            "qk_norm": True,
            "caption_channels": 32,
            "model_max_length": 8,
        }
        return cls(**(small | keys))
