"""Typed configurations: the keys of Open-Sora 1.1's files, and the few that this project adds.

Every key is declared, here or in `sections.py`, and an unknown one is an error. A key of Open-Sora that has no effect
here is accepted, and `find_idle_keys` says by name what happens in its place.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from opensora_fast.config.sections import (
    MASK_NAMES,
    BucketConfig,
    DatasetConfig,
    Dtype,
    MaskRatios,
    ModelConfig,
    SchedulerConfig,
    Section,
    TextEncoderConfig,
    VideoEncoderConfig,
    check_blocks,
)

# Keys known under another name: Open-Sora's training files say `enable_flashattn`, which its model silently ignores. As
# they lie in its version 1.2 they call the masks otherwise.
ALIASES = {
    "model.enable_flashattn": "model.enable_flash_attn",
    "mask_ratios.identity": "mask_ratios.mask_no",
} | {f"mask_ratios.{name.removeprefix('mask_')}": f"mask_ratios.{name}" for name in MASK_NAMES if name != "mask_no"}

# Of more than the system allows, a process ends without a word.
MOST_THREADS = 1024


class TrainConfig(Section):
    """Configuration of a training run."""

    dataset: DatasetConfig = DatasetConfig()
    bucket_config: BucketConfig
    mask_ratios: MaskRatios | None = None
    model: ModelConfig = ModelConfig()
    vae: VideoEncoderConfig = VideoEncoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    scheduler: SchedulerConfig = SchedulerConfig()

    seed: int = Field(42, ge=0, lt=2**64)
    dtype: Dtype = "bf16"
    lr: float = Field(2e-5, gt=0)
    grad_clip: float | None = Field(1.0, ge=0)
    grad_checkpoint: Annotated[bool | int, BeforeValidator(check_blocks)] = False
    epochs: int = Field(1000, ge=1)
    # The loss that is shown is the mean of so many steps; metrics.jsonl has every step.
    log_every: int = Field(10, ge=1)
    # Steps between checkpoints; 0: only at the end.
    ckpt_every: int = Field(1000, ge=0)
    # Clips decoded at a time; 0: one for each processor.
    num_workers: int = Field(4, ge=0, le=MOST_THREADS)
    # Checkpoint to continue; with start_from_scratch its weights, average and optimizer state, at step 0.
    load: str | None = Field(None, min_length=1)
    start_from_scratch: bool = False
    # So many processes compute each micro-batch together, each some of its frames (sequence parallelism).
    sp_size: int = Field(1, ge=1)
    # Show the numbers of metrics.jsonl at Weights & Biases, too.
    wandb: bool = False

    # Read for Open-Sora's sake; see find_idle_keys.
    num_bucket_build_workers: int | None = None
    plugin: str | None = None
    outputs: str | None = None
    batch_size: int | None = None

    # This project's own.
    # Stop after so many steps in all; None: after `epochs`.
    steps: int | None = Field(None, ge=0)
    # Write the numbers of metrics.jsonl as TensorBoard reads them, too, into DIR/tensorboard.
    tensorboard: bool = False
    # Folder of cached latents and text embeddings, made where it is not there, from so many passes over the clips.
    features: str | None = Field(None, min_length=1)
    feature_draws: int = Field(1, ge=1)
    # Threads of one operation on the CPU; None: torch's choice, or this process's share of the processors.
    cpu_threads: int | None = Field(None, ge=1, le=MOST_THREADS)
    decoder: Literal["auto", "pyav", "dali"] = "auto"
    # Batches made ahead; 0 makes each when it is needed.
    prefetch: int = Field(2, ge=0)
    # Leave out clips that do not fill a micro-batch, and micro-batches that do not fill a step; False: fill them up.
    drop_last: bool = True
    # Micro-batches of a step cost about the same, so that processes wait little for each other.
    balance: bool = False
    # Steps of at most so many video tokens are replayed as CUDA graphs; 0: none are.
    cuda_graph_tokens: int = Field(0, ge=0)
    # Train though the clips of an entry of bucket_config are too few for one batch.
    allow_empty_buckets: bool = False
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    # The newest so many are kept.
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> "TrainConfig":
        if self.scheduler.type == "dpm-solver":
            raise ValueError("scheduler.type='dpm-solver' only samples; train with 'iddpm' or 'iddpm-speed'")
        if self.sp_size != 1 and self.cuda_graph_tokens:
            raise ValueError(
                f"sp_size={self.sp_size} and cuda_graph_tokens={self.cuda_graph_tokens}: what processes exchange "
                "within a step is not recorded in CUDA graphs; use one of them"
            )
        if self.model.num_heads % self.sp_size:
            raise ValueError(
                f"sp_size={self.sp_size}: the {self.model.num_heads} heads of the model cannot be shared out evenly "
                f"among {self.sp_size} processes; take a divisor of {self.model.num_heads}"
            )
        if not self.bucket_config:
            raise ValueError(
                "bucket_config is empty: every clip would be dropped; write for example {'240p': {16: (1.0, 4)}}"
            )
        if self.start_from_scratch and self.load is None:
            raise ValueError("start_from_scratch=True needs `load`, the checkpoint whose weights to start from")
        if self.feature_draws != 1 and self.features is None:
            raise ValueError(
                f"feature_draws={self.feature_draws} needs `features`, the folder that the draws are cached in; give "
                "it, or leave both out"
            )
        if self.load is not None and self.model.from_pretrained is not None:
            raise ValueError("load and model.from_pretrained both name weights to start from; keep one")
        return self


class SampleConfig(Section):
    """Configuration of sampling, with the options of Open-Sora's inference-long."""

    num_frames: int = Field(16, ge=1)
    frame_interval: int = Field(1, ge=1)
    fps: int = Field(24, ge=1)
    image_size: tuple[int, int]
    multi_resolution: bool | Literal["STDiT2"] = "STDiT2"
    aspect_ratio_as_trained: bool = False

    prompt: list[str] | None = None
    prompt_path: str | None = None
    start_index: int | None = Field(None, ge=0)
    end_index: int | None = Field(None, ge=0)
    num_sample: int = Field(1, ge=1)
    sample_name: str | None = None
    prompt_as_path: bool = False
    loop: int = Field(1, ge=1)
    condition_frame_length: int = Field(4, ge=1)
    mask_strategy: list[str | None] | None = None
    reference_path: list[str | None] | None = None

    model: ModelConfig = ModelConfig()
    vae: VideoEncoderConfig = VideoEncoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    scheduler: SchedulerConfig = SchedulerConfig(num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3)
    dtype: Dtype = "bf16"
    batch_size: int = Field(1, ge=1)
    seed: int = Field(42, ge=0)
    save_dir: str | None = None

    # This project's own.
    cpu_threads: int | None = Field(None, ge=1, le=MOST_THREADS)
    # Calls of the model on at most so many video tokens replay a CUDA graph; 0: none do.
    cuda_graph_tokens: int = Field(0, ge=0)


def find_idle_keys(config: TrainConfig | SampleConfig) -> list[str]:
    """Lines `key=value: what happens instead` for keys that were given and have no effect here."""
    notes = []
    for key, instead in (IDLE_KEYS | (IDLE_TRAINING_KEYS if isinstance(config, TrainConfig) else {})).items():
        *sections, name = key.split(".")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        if name not in section.model_fields_set:
            continue
        value = getattr(section, name)
        if value != type(section).model_fields[name].default:
            notes.append(f"{key}={value!r} {instead}")
    return notes


IDLE_KEYS = {
    "model.enable_flash_attn": "has no effect: the device decides how every op is computed",
    "model.enable_layernorm_kernel": "has no effect: apex is not used",
    "multi_resolution": "has no effect: the model is always told the size of what it makes",
    "text_encoder.shardformer": "makes T5 compute in the configuration's dtype; ColossalAI's layers are not used",
}
IDLE_TRAINING_KEYS = {
    "num_bucket_build_workers": "has no effect: clips are put into buckets in one vectorized pass",
    "plugin": "has no effect: ColossalAI is not used; torchrun's processes share the optimizer state (ZeRO 1)",
    "outputs": "has no effect: --out names the folder of the run",
    "batch_size": "has no effect: bucket_config gives the batch sizes",
    "scheduler.cfg_scale": "has no effect in training: it guides sampling",
    "scheduler.cfg_channel": "has no effect in training: it guides sampling",
}
