"""ST-DiT-2, the diffusion transformer of Open-Sora 1.1, computed on packs of videos of any shapes.

Letters: B videos, T frames, H W latent height and width, N tokens of the pack, C hidden size, L text tokens,
R rows of the modulation tables (B, or 2·B when frames are given), M text tokens of the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_fast import kernels
from opensora_fast.kernels import PackLayout, TextLayout
from opensora_fast.parallel.sequence import SequenceGroup

from . import weights
from .backends import Backends
from .block import FinalLayer, PackContext, STDiT2Block, is_wrapped, modulation_tables
from .config import STDiT2Config
from .embedders import CaptionEmbedder, PatchEmbedder, RotaryFrequencies, ScalarEmbedder, rotary_tables
from .initialize import freeze, initialize_weights
from .positions import add_positions, position_scales


class STDiT2(nn.Module):
    """The model; state-dict keys are upstream's.

    Attributes:
        backends: which implementation each op uses; set it through `use_kernels`.
        checkpointed_blocks: the first so many blocks recompute their activations in backward.
        sequence: processes that compute each pack together with this one, given the same arguments; each gets the
            whole output. Set it through `share_frames`.
    """

    def __init__(self, config: STDiT2Config):
        super().__init__()
        self.config = config
        self.backends = Backends()
        self.checkpointed_blocks = 0
        self.sequence: SequenceGroup | None = None
        channels = config.hidden_size
        self.x_embedder = PatchEmbedder(config.in_channels, config.patch_size, channels)
        self.t_embedder = ScalarEmbedder(channels)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(channels, 3 * channels))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, channels, config.class_dropout_prob, config.model_max_length
        )
        self.rope = RotaryFrequencies(config.head_size, config.upstream_rounding)
        self.blocks = nn.ModuleList(
            STDiT2Block(channels, config.num_heads, config.mlp_ratio, config.qk_norm) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(channels, config.patch_size[1] ** 2 * config.out_channels)
        self.csize_embedder = ScalarEmbedder(channels // 3)
        self.ar_embedder = ScalarEmbedder(channels // 3)
        self.fl_embedder = ScalarEmbedder(channels)
        self.fps_embedder = ScalarEmbedder(channels)
        initialize_weights(self)
        freeze(self, config.freeze)

    @property
    def patch(self) -> int:
        return self.config.patch_size[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.weight.device

    def set_checkpointing(self, blocks: int | bool) -> None:
        """Recomputes activations in backward for the first `blocks` blocks (True: all, False: none).

        Raises:
            ValueError: more blocks than the model has, or a number that is negative or not whole.
        """
        if not isinstance(blocks, int):
            raise ValueError(f"set_checkpointing: {blocks!r}; give True, False or a whole number of blocks")
        blocks = len(self.blocks) if blocks is True else int(blocks)
        if not 0 <= blocks <= len(self.blocks):
            raise ValueError(f"set_checkpointing: {blocks} blocks, but the model has {len(self.blocks)}")
        self.checkpointed_blocks = blocks

    @property
    def grad_checkpointing(self) -> bool:
        """`set_checkpointing` for all blocks, as Open-Sora's `set_grad_checkpoint(model)` asks for it: it sets this."""
        return self.checkpointed_blocks == len(self.blocks)

    @grad_checkpointing.setter
    def grad_checkpointing(self, every: bool) -> None:
        self.set_checkpointing(bool(every))

    def share_frames(self, sequence: SequenceGroup | None) -> None:
        """Computes packs together with other processes, each a part of the frames; None: alone again.

        All must have the same weights. Gradients of parameters are then to be summed over the processes.

        Raises:
            ValueError: the heads cannot be shared out among so many processes.
        """
        if sequence is not None and self.config.num_heads % sequence.size:
            raise ValueError(
                f"{sequence.size} processes cannot compute a video together: the {self.config.num_heads} heads are to "
                f"be shared out evenly; take a divisor of {self.config.num_heads} (sp_size in training)"
            )
        self.sequence = sequence

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        num_frames: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        ar: Tensor | None = None,
        fps: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Predicts noise and variance coefficients of equal-shaped videos.

        Tensors that describe the videos may lie on the host while x is on the GPU; no value is read back from the GPU.
        Those with fewer rows than x are repeated, as classifier-free guidance needs. As upstream does, positions are
        scaled by the height and width of the first video. Numbers of a video are rounded to the model's dtype here,
        which upstream leaves to its trainer and sampler but for the timestep (`upstream_rounding`).

        Args:
            x: [B, in_channels, T, H, W] latents.
            timestep: [B], 0 … 999.
            y: [B, 1, L, caption_channels] text embeddings.
            mask: [B, L], nonzero = real text token; None = all real.
            x_mask: bool [B, T], True = noised frame, False = given frame (timestep 0); None = all noised.
            num_frames: [B] frames of each video.
            height, width: [B] in pixels.
            ar: [B] aspect ratio.
            fps: [B] frames per second.
            dropped: bool [B], True for captions to be replaced by the unconditional one, as
                `y_embedder.draw_dropped` draws them; None draws them here in training, and replaces none otherwise.

        Returns:
            float32 [B, out_channels, T, H, W]: noise, then (with pred_sigma) variance coefficients.

        Raises:
            ValueError: an argument is missing or its shape does not fit.
        """
        self._check_latents("x", x, batched=True)
        if x_mask is not None:
            _check_tensor("x_mask", x_mask)
            x_mask = _repeat_rows("x_mask", x_mask, x.shape[0])
        outputs = self._forward_batches(
            [x], timestep, y, mask, x_mask, num_frames, height, width, ar, fps, dropped, position_of_first=True
        )
        return outputs[0]

    def forward_packed(
        self,
        videos: Sequence[Tensor],
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_masks: Sequence[Tensor | None] | None = None,
        num_frames: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        ar: Tensor | None = None,
        fps: Tensor | None = None,
    ) -> list[Tensor]:
        """Predicts noise and variance coefficients of videos of different shapes in one pass, without padding.

        Args:
            videos: list of [in_channels, T_i, H_i, W_i] latents.
            x_masks: list of bool [T_i] or None for each video; None = all noised.
            timestep, y, mask, num_frames, height, width, ar, fps: [B, …] as in `forward`.

        Returns:
            List of float32 [out_channels, T_i, H_i, W_i].

        Raises:
            ValueError: an argument is missing or its shape does not fit.
        """
        if len(videos) == 0:
            raise ValueError("videos: the list is empty; give at least one")
        for index, video in enumerate(videos):
            self._check_latents(f"videos[{index}]", video, batched=False)
        outputs = self._forward_batches(
            _stack_equal(videos), timestep, y, mask, x_masks, num_frames, height, width, ar, fps
        )
        return [video for batch in outputs for video in batch]

    def get_layout(self, batches: Sequence[Tensor]) -> PackLayout:
        """Where the tokens of batches [b, channels, T, H, W] lie; cached by their shapes."""
        shapes = [kernels.token_grid(*batch.shape[2:], self.patch) for batch in batches for _ in range(batch.shape[0])]
        return PackLayout.of(shapes, self.device)

    def _check_latents(self, name: str, latents: Tensor, *, batched: bool) -> None:
        _check_tensor(name, latents)
        if latents.ndim != (5 if batched else 4):
            expected = "[B, channels, T, H, W]" if batched else "[channels, T, H, W]"
            raise ValueError(f"{name}: shape {tuple(latents.shape)}, expected {expected}")
        if latents.shape[-4] != self.config.in_channels:
            raise ValueError(f"{name}: {latents.shape[-4]} channels, but the model takes {self.config.in_channels}")
        if not latents.is_floating_point():
            raise ValueError(f"{name}: {latents.dtype}, expected floating-point latents")
        if latents.device != self.device:
            raise ValueError(f"{name} is on {latents.device}, but the model is on {self.device}")

    def _forward_batches(
        self,
        batches: list[Tensor],
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None,
        x_masks: Sequence[Tensor | None] | Tensor | None,
        num_frames: Tensor | None,
        height: Tensor | None,
        width: Tensor | None,
        ar: Tensor | None,
        fps: Tensor | None,
        dropped: Tensor | None = None,
        position_of_first: bool = False,
    ) -> list[Tensor]:
        """Both forwards: `batches` holds batches [b, channels, T, H, W] of equal-shaped videos, in pack order."""
        if hasattr(self.rope.freqs, "full_tensor"):
            raise ValueError(
                f"{type(self).__name__}: its parameters are DTensors here; call the model itself, which gathers them, "
                "or say torch.distributed.fsdp.register_fsdp_forward_method(model, 'forward_packed') first"
            )
        device, config = self.device, self.config
        layout = self.get_layout(batches)
        videos = layout.num_videos

        conditions = {
            "timestep": timestep, "num_frames": num_frames, "height": height, "width": width, "ar": ar, "fps": fps
        }  # fmt: skip
        conditions = {name: self.read_condition(name, value, videos) for name, value in conditions.items()}
        scales = position_scales(conditions["height"], conditions["width"], config.input_sq_size)
        if position_of_first:
            scales = [scales[0]] * videos
        batch_shapes = [(batch.shape[0], *batch.shape[2:]) for batch in batches]
        y, mask, dropped = self._text_rows(y, mask, dropped, videos)
        frame_rows = layout.modulation_rows(x_masks)
        has_given = frame_rows is not layout.frame_video
        share, max_frames = None, layout.max_frames
        if self.sequence is not None:
            share = self.sequence.divide(layout)
            own = share.videos
            batches = _stack_equal(share.take_frames([video for batch in batches for video in batch]))
            layout = self.get_layout(batches)
            frame_rows = share.take_frame_rows(frame_rows) if has_given else layout.frame_video
            scales, y = scales[own], y[own]
            conditions = {name: value[own] for name, value in conditions.items()}
            mask, dropped = (None if rows is None else rows[own] for rows in (mask, dropped))
        conditions = {name: value.to(device, non_blocking=True) for name, value in conditions.items()}

        patches = kernels.patchify([batch.to(self.dtype) for batch in batches], self.patch)
        rounded_to = self.dtype if config.upstream_rounding else torch.float32
        x = add_positions(self.x_embedder(patches), scales, layout, rounded_to)
        noised, given, space_and_mlp, time = self.make_modulation(conditions, has_given)
        text, text_layout = self._embed_text(y, mask, dropped)
        cos, sin = rotary_tables(self.rope.freqs, max_frames)
        context = PackContext(
            layout, frame_rows, text, text_layout, space_and_mlp, time, cos, sin, self.backends, share
        )

        x = self.run_blocks(x, context)
        tokens = self.final_layer(x, noised, given, context)
        if share is not None:
            tokens = share.gather(tokens)
        outputs = kernels.unpatchify(tokens, batch_shapes, self.patch, config.out_channels)
        return [output.float() for output in outputs]

    def read_condition(self, name: str, value: Tensor | None, videos: int) -> Tensor:
        """[B] conditioning scalars, on the device they came on."""
        if value is None:
            raise ValueError(f"{name}: missing; give one number per video")
        value = torch.as_tensor(value).reshape(-1)
        value = _repeat_rows(name, value, videos)
        return value.to(self.dtype) if self.config.upstream_rounding else value.float()

    def make_modulation(
        self, conditions: dict[str, Tensor], has_given: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Returns the vectors [B, C] of noised and given frames for the final layer, and the tables [R, 6 or 3, C].

        With given frames the tables have 2·B rows: row B + b is that of timestep 0.
        """
        timestep = conditions["timestep"]
        videos = timestep.shape[0]
        size = self.csize_embedder(torch.stack([conditions["height"], conditions["width"]], dim=1))
        data_info = torch.cat([size, self.ar_embedder(conditions["ar"])], dim=1)
        length_info = self.fl_embedder(conditions["num_frames"]) + self.fps_embedder(conditions["fps"])
        if has_given:
            timestep = torch.cat([timestep, torch.zeros_like(timestep)])
            data_info, length_info = data_info.repeat(2, 1), length_info.repeat(2, 1)
        time = self.t_embedder(timestep)
        space_and_mlp = self.t_block(time + data_info).unflatten(1, (6, -1))
        temporal = self.t_block_temp(time + length_info).unflatten(1, (3, -1))
        given = (time + data_info)[videos:] if has_given else None
        return time[:videos], given, space_and_mlp, temporal

    def _text_rows(
        self, y: Tensor, mask: Tensor | None, dropped: Tensor | None, videos: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Checks the text; returns y, the mask [B, L] and which captions are dropped [B], None where none are."""
        _check_tensor("y", y)
        if y.ndim != 4 or y.shape[0] != videos or y.shape[1] != 1 or y.shape[3] != self.config.caption_channels:
            raise ValueError(
                f"y: shape {tuple(y.shape)}, expected ({videos}, 1, text tokens, {self.config.caption_channels})"
            )
        if mask is not None:
            _check_tensor("mask", mask)
            mask = _repeat_rows("mask", mask.reshape(mask.shape[0], -1), videos)
        if dropped is None and self.training and self.y_embedder.dropout_probability > 0:
            dropped = self.y_embedder.draw_dropped(videos)
        return y, mask, dropped

    def _embed_text(self, y: Tensor, mask: Tensor | None, dropped: Tensor | None) -> tuple[Tensor, TextLayout]:
        """Returns the embedded real text tokens [M, C] and where they lie."""
        y = y.squeeze(1).to(self.device, self.dtype, non_blocking=True)
        if dropped is not None:
            y = self.y_embedder.drop(y, dropped)
        layout, index = TextLayout.from_mask(mask, y.shape[0], y.shape[1], self.device)
        return self.y_embedder(y.flatten(0, 1)[index]), layout

    def run_blocks(self, x: Tensor, context: PackContext) -> Tensor:
        """x [N, C] → [N, C], the residual stream before and behind all blocks."""
        if any(is_wrapped(block) for block in self.blocks):
            return self._run_wrapped_blocks(x, context)
        normed, last = None, len(self.blocks) - 1
        tables = modulation_tables(self.blocks, context)
        for index, block in enumerate(self.blocks):
            if index < self.checkpointed_blocks and torch.is_grad_enabled():
                # Blocks draw no random numbers, so there is no generator state to keep. A recomputed block keeps only
                # x, so it makes its own norm and none for the next block.
                x, normed = checkpoint(
                    block, x, None, context, None, tables[index], use_reentrant=False, preserve_rng_state=False
                )
            else:
                following = tables[index + 1] if self.checkpointed_blocks <= index < last else None
                x, normed = block(x, normed, context, following, tables[index])
        return x

    def _run_wrapped_blocks(self, x: Tensor, context: PackContext) -> Tensor:
        """As `run_blocks` where others have put something around blocks: each makes its own tables and norm then, from
        tensors that it is given one by one."""
        arguments = (None, context, None, None, context.text, context.space_and_mlp, context.time)
        for index, block in enumerate(self.blocks):
            if index < self.checkpointed_blocks and torch.is_grad_enabled():
                x, _ = checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, _ = block(x, *arguments)
        return x

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> STDiT2:
        """Loads `config.json` and safetensors weights from a folder or hub id; see `weights.load_pretrained`."""
        config, state = weights.load_pretrained(folder)
        model = cls(config)
        weights.load_strictly(model, state, folder)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, which `from_pretrained` and upstream read.

        Raises:
            ValueError: the parameters are shared out among processes; see `weights.save_pretrained`.
        """
        weights.save_pretrained(self.config, self.state_dict(), folder)


def _stack_equal(videos: Sequence[Tensor]) -> list[Tensor]:
    """Batches [b, channels, T, H, W] of consecutive videos [channels, T, H, W] of equal shape."""
    batches: list[list[Tensor]] = []
    for video in videos:
        if batches and batches[-1][0].shape == video.shape:
            batches[-1].append(video)
        else:
            batches.append([video])
    return [torch.stack(batch) for batch in batches]


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.ndim == 0:
        found = "a single number" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor with several elements, got {found}")


def _repeat_rows(name: str, value: Tensor, videos: int) -> Tensor:
    """Repeats [B/k, …] to [B, …], as upstream does for classifier-free guidance."""
    if value.shape[0] == videos:
        return value
    if value.shape[0] == 0 or videos % value.shape[0]:
        raise ValueError(f"{name}: {value.shape[0]} rows for {videos} videos; give one per video")
    return value.repeat(videos // value.shape[0], *[1] * (value.ndim - 1))
