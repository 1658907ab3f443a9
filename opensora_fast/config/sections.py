"""The sections of a configuration: dataset, bucket table, masks, model, encoders, scheduler."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from opensora_fast.suggest import suggest

MASK_NAMES = (
    "mask_no",
    "mask_quarter_random",
    "mask_quarter_head",
    "mask_quarter_tail",
    "mask_quarter_head_tail",
    "mask_image_random",
    "mask_image_head",
    "mask_image_tail",
    "mask_image_head_tail",
)


class Section(BaseModel):
    """A dictionary of a configuration file with declared keys."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """True would be read as 1: `cuda_graph_tokens=True` as graphs of one token."""
        annotation = cls.model_fields[info.field_name].annotation
        types = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and bool not in types and types & {int, float}:
            raise ValueError("write a number, this is no switch")
        return value


DIFFUSION_KEYS = (
    "num_sampling_steps",
    "timestep_respacing",
    "noise_schedule",
    "use_kl",
    "sigma_small",
    "predict_xstart",
    "learn_sigma",
    "rescale_learned_sigmas",
    "diffusion_steps",
    "cfg_scale",
)


class TypedSection(Section):
    """A section whose `type` decides which of the other keys mean anything; the others are refused when given."""

    keys_by_type: ClassVar[dict[str, frozenset[str]]] = {}

    @model_validator(mode="after")
    def _refuse_keys_without_effect(self) -> "TypedSection":
        type_name = self.type  # type: ignore[attr-defined]
        allowed = self.get_keys_of_type()
        idle = sorted(self.model_fields_set - allowed)
        defaults = {key: type(self).model_fields[key].default for key in idle}
        idle = [key for key in idle if getattr(self, key) != defaults[key]]
        if idle:
            # To be set where the key is of a file, and the type of the command line.
            values = ", ".join(f"{key}={defaults[key]!r}" for key in idle)
            raise ValueError(
                f"{', '.join(idle)} would have no effect with type={type_name!r}; remove it, or set {values} "
                f"(keys of this type: {', '.join(sorted(allowed))})"
            )
        return self

    def get_keys_of_type(self) -> frozenset[str]:
        """`type` and the names of the keys that it takes."""
        return self.keys_by_type[self.type] | {"type"}  # type: ignore[attr-defined]

    def get_keys(self) -> dict[str, Any]:
        """`type` and the keys that it takes, as the builders expect them; None is left to the builder."""
        allowed = self.get_keys_of_type()
        return {name: value for name, value in self.model_dump().items() if name in allowed and value is not None}


def check_mask_ratios(ratios: Mapping[str, Any]) -> None:
    """ValueError where a mask is unknown, a ratio is none, or they do not sum to 1."""
    for name, ratio in ratios.items():
        if name not in MASK_NAMES:
            raise ValueError(f"unknown mask {name!r}; {suggest(name, MASK_NAMES)}")
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ValueError(f"{name} is {ratio!r}; a ratio is a number from 0 to 1")
    total = math.fsum(ratios.values())
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"the ratios sum to {total:g}; they must sum to 1: mask_no takes what the others leave")


def _check_mask_section(value: Any) -> Any:
    if isinstance(value, dict):
        check_mask_ratios(value)
    return value


MaskRatios = Annotated[dict[str, float], BeforeValidator(_check_mask_section)]


def _check_bucket_entry(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("write (keep probability, batch size), for example (1.0, 4)")
    return value


# resolution -> frames -> (keep probability, batch size). A tuple as batch size is the search range of Open-Sora's
# benchmark.py: it can be read and shown, and training refuses it by name.
BucketEntry = Annotated[tuple[float, int | tuple[int, ...] | None], BeforeValidator(_check_bucket_entry)]
BucketConfig = dict[str, dict[int, BucketEntry]]


def _decided_by_buckets(value: Any) -> Any:
    if any(item is not None for item in (value if isinstance(value, (list, tuple)) else [value])):
        raise ValueError("must be None: bucket_config decides the frames and sizes of every batch")
    return None


def _check_dataset_type(value: Any) -> Any:
    if value != "VariableVideoTextDataset":
        raise ValueError(
            "only 'VariableVideoTextDataset' is read; for one fixed size write a bucket_config of one bucket"
        )
    return value


def _check_transform(value: Any) -> Any:
    if value != "resize_crop":
        raise ValueError("only 'resize_crop' is done: cover the bucket's size, then crop the center")
    return value


def _check_dtype(value: Any) -> Any:
    if value not in ("bf16", "fp32"):
        raise ValueError(
            "use 'bf16' or 'fp32'"
            + ("; fp16 is not supported, training would need loss scaling" if value == "fp16" else "")
        )
    return value


def check_blocks(value: Any) -> Any:
    if not isinstance(value, int) or value < 0:
        raise ValueError("write True (every block), False, or the number of blocks to recompute")
    return value


Dtype = Annotated[str, BeforeValidator(_check_dtype)]
GivenByBuckets = Annotated[None, BeforeValidator(_decided_by_buckets)]


class DatasetConfig(Section):
    type: Annotated[str, BeforeValidator(_check_dataset_type)] = "VariableVideoTextDataset"
    data_path: str | None = None
    frame_interval: int = Field(1, ge=1)
    num_frames: GivenByBuckets = None
    image_size: GivenByBuckets = None
    transform_name: Annotated[str, BeforeValidator(_check_transform)] = "resize_crop"
    fps_after_interval: bool = False


class ModelConfig(Section):
    """Keys of the model, with the defaults of `STDiT2Config` (a test keeps them equal).

    What the encoders decide (latent channels, text width and length) is not given here. Both types take every key:
    "STDiT2-XL/2" is the shape of the defaults.
    """

    type: Literal["STDiT2-XL/2", "STDiT2"] = "STDiT2-XL/2"
    from_pretrained: str | None = None
    input_sq_size: int = 32
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: tuple[int, PositiveInt, PositiveInt] = (1, 2, 2)
    class_dropout_prob: float = 0.1
    pred_sigma: bool = True
    drop_path: float = 0.0
    no_temporal_pos_emb: bool = False
    freeze: str | None = None
    qk_norm: bool = False
    # So Open-Sora 1.2 calls what 1.1 does: queries and keys are rotated, then normalized.
    qk_norm_legacy: bool = True
    upstream_rounding: bool = True
    enable_flash_attn: bool = False
    enable_layernorm_kernel: bool = False

    @model_validator(mode="after")
    def _refuse_the_other_order(self) -> "ModelConfig":
        if self.qk_norm and not self.qk_norm_legacy:
            raise ValueError(
                "qk_norm_legacy=False is another model, which normalizes queries and keys before it rotates them; "
                "Open-Sora 1.1's, and its weights, need True"
            )
        return self

    def get_shape_keys(self) -> dict[str, Any]:
        """Keyword arguments of `STDiT2Config`."""
        others = {"type", "from_pretrained", "qk_norm_legacy", "enable_flash_attn", "enable_layernorm_kernel"}
        return self.model_dump(exclude=others)


class VideoEncoderConfig(TypedSection):
    keys_by_type: ClassVar[dict[str, frozenset[str]]] = {
        "VideoAutoencoderKL": frozenset(
            ("from_pretrained", "micro_batch_size", "latents", "cache_dir", "local_files_only")
        ),
        "linear": frozenset(("from_pretrained",)),
    }
    type: Literal["VideoAutoencoderKL", "linear"] = "VideoAutoencoderKL"
    from_pretrained: str | None = None
    micro_batch_size: int | None = Field(None, ge=1)
    latents: Literal["sample", "mode"] = "sample"
    cache_dir: str | None = None
    local_files_only: bool = False


class TextEncoderConfig(TypedSection):
    keys_by_type: ClassVar[dict[str, frozenset[str]]] = {
        "t5": frozenset(
            ("from_pretrained", "model_max_length", "clean_captions", "cache_dir", "local_files_only", "shardformer")
        ),
        "bytes": frozenset(("model_max_length", "clean_captions", "output_dim", "depth", "seed")),
    }
    type: Literal["t5", "bytes"] = "t5"
    from_pretrained: str | None = None
    model_max_length: int = Field(120, ge=1)
    clean_captions: bool = True
    cache_dir: str | None = None
    local_files_only: bool = False
    shardformer: bool = False
    output_dim: int = Field(64, ge=1)
    depth: int = Field(2, ge=1)
    seed: int = Field(0, ge=0)


class SchedulerConfig(TypedSection):
    keys_by_type: ClassVar[dict[str, frozenset[str]]] = {
        "iddpm": frozenset((*DIFFUSION_KEYS, "cfg_channel")),
        "iddpm-speed": frozenset(DIFFUSION_KEYS),
        "dpm-solver": frozenset(("num_sampling_steps", "cfg_scale")),
    }
    type: Literal["iddpm", "iddpm-speed", "dpm-solver"] = "iddpm"
    num_sampling_steps: int | None = Field(None, ge=1)
    timestep_respacing: str | None = None
    noise_schedule: str = "linear"
    use_kl: bool = False
    sigma_small: bool = False
    predict_xstart: bool = False
    learn_sigma: bool = True
    rescale_learned_sigmas: bool = False
    diffusion_steps: int = Field(1000, ge=1)
    cfg_scale: float = 4.0
    cfg_channel: int | None = Field(None, ge=1)
