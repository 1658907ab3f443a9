"""Generating videos and images from prompts and references.

generator = opensora_fast.sampling.build.build_generator(load_sample_config("sample.py").config)
[sample] = generator.generate("a car driving on the ocean")
sample.save("ocean")                                             # ocean.mp4
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opensora_fast.progress import Progress
from opensora_fast.sampling.prompts import Prompt, parse_prompt
from opensora_fast.sampling.references import (
    Placement,
    check_placements,
    find_source,
    parse_mask_strategy,
    place_references,
)

if TYPE_CHECKING:
    from opensora_fast.encoders import TextEncoder, VideoEncoder
    from opensora_fast.model import STDiT2
    from opensora_fast.sampling.replayed_model import ReplayedModel


@dataclass(frozen=True)
class SampleSettings:
    """How to sample.

    Attributes:
        num_frames: frames of one loop; 1 is an image.
        image_size: (height, width) in pixels, of which whole latent pixels are made, as by Open-Sora: with latents of
            8 x 8 pixels 240 x 426 becomes 240 x 424. The model is told this size.
        fps: frames per second that the model is told (images are told 120).
        frame_interval: the video is played at fps / frame_interval.
        loop: number of loops; each goes on from the last frames of the one before.
        condition_frame_length: how many of them.
        num_sample: samples of each prompt.
        batch_size: prompts sampled at a time. A sample does not depend on it, but for rounding.
        seed: equal seeds give equal samples.
        first_index: number of the first prompt. A part of a list of prompts, which begins there, gets the samples that
            it has in the whole list.
        aspect_ratio_as_trained: tell the model width / height, as in training. Open-Sora's sampler tells it
            height / width, and so does this one by default.
    """

    num_frames: int = 16
    image_size: tuple[int, int] = (240, 426)
    fps: float = 24
    frame_interval: int = 1
    loop: int = 1
    condition_frame_length: int = 4
    num_sample: int = 1
    batch_size: int = 1
    seed: int = 42
    first_index: int = 0
    aspect_ratio_as_trained: bool = False

    def __post_init__(self) -> None:
        for name in ("num_frames", "frame_interval", "loop", "condition_frame_length", "num_sample", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.fps <= torch.finfo(torch.float32).max:  # in which the model is told
            raise ValueError(f"fps must be a finite number above 0, got {self.fps}")
        for name in ("seed", "first_index"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be (height, width) in pixels, got {self.image_size}")
        if self.loop > 1 and self.condition_frame_length >= self.num_frames:
            raise ValueError(
                f"condition_frame_length {self.condition_frame_length} leaves nothing to generate of "
                f"{self.num_frames} frames in later loops; make it smaller, raise num_frames or set loop=1"
            )


@dataclass(frozen=True)
class Sample:
    """A generated video or image.

    Attributes:
        prompt: its text.
        index: number of the prompt.
        copy: number of the sample of this prompt, from 0.
        video: float32 [3, T, H, W] on the CPU in [-1, 1].
        fps: frames per second to play it at.
    """

    prompt: str
    index: int
    copy: int
    video: Tensor
    fps: float

    def save(self, path: str | Path) -> Path:
        """Write it as MP4, or as PNG if it is one frame. `path` has no ending; returns the path with it."""
        from opensora_fast.data.video_files import save_image, save_video

        if self.video.shape[1] == 1:
            path = Path(f"{path}.png")
            save_image(path, self.video)
        else:
            path = Path(f"{path}.mp4")
            save_video(path, self.video, self.fps)
        return path


@dataclass(frozen=True)
class _Task:
    """A prompt with its references' files and where they go."""

    index: int
    prompt: Prompt
    reference_files: tuple[str, ...]
    placements: tuple[Placement, ...]


class VideoGenerator:
    """A model with its encoders and a sampler; `opensora_fast.sampling.build` makes one of a configuration.

    Args:
        model: an `STDiT2` (or another with the same `forward`) on its device; called in evaluation mode.
        video_encoder, text_encoder: see `opensora_fast.encoders`, on the same device.
        scheduler: `IDDPM`, or `DPMSolver` for drafts without references and loops.
        settings: defaults for `generate`.
        replayed: is called in place of the model, whose calls it replays as CUDA graphs; of this model, also where
            another is set later.
    """

    def __init__(
        self,
        model: STDiT2,
        video_encoder: VideoEncoder,
        text_encoder: TextEncoder,
        scheduler: Any,
        settings: SampleSettings | None = None,
        replayed: ReplayedModel | None = None,
    ) -> None:
        self.model = model
        self.video_encoder = video_encoder
        self.text_encoder = text_encoder
        self.scheduler = scheduler
        self.settings = settings or SampleSettings()
        self.replayed = replayed

    def generate(
        self,
        prompts: str | Sequence[str],
        reference_paths: Sequence[str | None] | None = None,
        mask_strategies: Sequence[str | None] | None = None,
        *,
        progress: bool = True,
        **settings: Any,
    ) -> list[Sample]:
        """Generate samples of the prompts; see `stream`, which gives them as they are done."""
        return list(self.stream(prompts, reference_paths, mask_strategies, progress=progress, **settings))

    def stream(
        self,
        prompts: str | Sequence[str],
        reference_paths: Sequence[str | None] | None = None,
        mask_strategies: Sequence[str | None] | None = None,
        *,
        progress: bool = True,
        **settings: Any,
    ) -> Iterator[Sample]:
        """Generate samples of the prompts, one batch of prompts after the other.

        Args:
            prompts: texts, which may hold loop texts and a JSON suffix (`opensora_fast.sampling.prompts`).
            reference_paths: for each prompt its files joined by ";", or None. A prompt's JSON suffix wins.
            mask_strategies: for each prompt where they go (`opensora_fast.sampling.references`), or None.
            progress: show a progress bar over all steps.
            settings: fields of `SampleSettings` that replace this generator's.

        Raises:
            ValueError: a malformed prompt, reference or mask strategy, by name. All prompts are parsed before the
                first is sampled. Also if `replayed` is of another model.
        """
        if self.replayed is not None and self.replayed.model is not self.model:
            raise ValueError(
                "the calls that would be replayed are those of another model than this generator's: set `replayed` to "
                "a ReplayedModel of it, or to None"
            )
        chosen = replace(self.settings, **settings)
        tasks = make_tasks([prompts] if isinstance(prompts, str) else prompts, reference_paths, mask_strategies, chosen)
        if min(self.video_encoder.get_latent_size((chosen.num_frames, *chosen.image_size))) < 1:
            raise ValueError(f"image_size {chosen.image_size} is smaller than one latent pixel; make it larger")
        batches = [tasks[start : start + chosen.batch_size] for start in range(0, len(tasks), chosen.batch_size)]
        if not progress:
            yield from self._run(batches, chosen, False)
            return
        steps = len(batches) * chosen.num_sample * chosen.loop * self.scheduler.num_timesteps
        with Progress("sample", total=steps, unit="steps") as bar:
            yield from self._run(batches, chosen, bar)

    def _run(self, batches: list[list[_Task]], settings: SampleSettings, progress: bool | Progress) -> Iterator[Sample]:
        for batch in batches:
            references = [self._encode_references(task, settings) for task in batch]
            for copy in range(settings.num_sample):
                videos = self._sample_long(batch, references, copy, settings, progress)
                for task, video in zip(batch, videos, strict=True):
                    yield Sample(task.prompt.text, task.index, copy, video, settings.fps / settings.frame_interval)

    def _encode_references(self, task: _Task, settings: SampleSettings) -> list[Tensor]:
        """Latents [C, t, h, w] of each reference; ValueError where one lacks frames, be it for a later loop."""
        from opensora_fast.data.video_files import read_reference

        generator = _make_generator(settings.seed, task.index, 0)
        videos = [read_reference(path, settings.image_size) for path in task.reference_files]
        for placement in task.placements:
            try:
                find_source(placement, videos[placement.reference].shape[1])
            except ValueError as error:
                raise _name_prompt(task.index, task.prompt, error) from error
        return [self._encode(video, generator) for video in videos]

    def _encode(self, video: Tensor, generator: torch.Generator) -> Tensor:
        return self.video_encoder.encode(video.unsqueeze(0), generator=generator)[0]

    def _sample_long(
        self,
        batch: list[_Task],
        references: list[list[Tensor]],
        copy: int,
        settings: SampleSettings,
        progress: bool | Progress,
    ) -> list[Tensor]:
        """All loops of a batch of prompts: a video [3, T, H, W] for each."""
        # One generator for each video, so that it is the same in any batch.
        generators = [_make_generator(settings.seed, task.index, copy + 1) for task in batch]
        overlap = settings.condition_frame_length
        parts: list[list[Tensor]] = [[] for _ in batch]
        for loop in range(settings.loop):
            loop_references = [list(own) for own in references]
            placements = [list(task.placements) for task in batch]
            if loop > 0:
                for row, last in enumerate(parts):
                    placements[row].append(Placement(loop, len(loop_references[row]), length=overlap))
                    loop_references[row].append(self._encode(last[-1][:, -overlap:], generators[row]))
            texts = [task.prompt.loop_texts[loop] for task in batch]
            clips = self._sample_once(texts, loop_references, placements, loop, generators, settings, progress)
            for part, clip in zip(parts, clips, strict=True):
                part.append(clip)
        videos = (torch.cat([part[0], *(clip[:, overlap:] for clip in part[1:])], dim=1) for part in parts)
        return [video.clamp(-1, 1) for video in videos]

    @torch.no_grad()
    def _sample_once(
        self,
        texts: list[str],
        references: list[list[Tensor]],
        placements: list[list[Placement]],
        loop: int,
        generators: list[torch.Generator],
        settings: SampleSettings,
        progress: bool | Progress,
    ) -> Tensor:
        """One loop: videos [n, 3, T, H, W], float32 on the CPU, not clamped: the next loop goes on from them."""
        device = self.model.device
        frames, height, width = self.video_encoder.get_latent_size((settings.num_frames, *settings.image_size))
        shape = (self.video_encoder.out_channels, frames, height, width)
        noise = [torch.randn(shape, generator=generator, device="cpu") for generator in generators]
        latents = torch.stack(noise).to(device)
        masks = torch.stack(
            [place_references(*row, loop=loop) for row in zip(latents, references, placements, strict=True)]
        )
        was_training = self.model.training
        self.model.eval()
        try:
            latents = self.scheduler.sample(
                self.model if self.replayed is None else self.replayed,
                self.text_encoder,
                latents,
                texts,
                device,
                make_conditions(len(texts), settings),
                masks,
                generator=generators,
                progress=progress,
            )
        finally:
            self.model.train(was_training)
        return self.video_encoder.decode(latents).float().cpu()


def make_conditions(count: int, settings: SampleSettings) -> dict[str, Tensor]:
    """What the model is told of `count` equal videos: float32 [count] each, on the CPU."""
    from opensora_fast.data.manifest import IMAGE_FPS

    height, width = settings.image_size
    values = {
        "num_frames": settings.num_frames,
        "height": height,
        "width": width,
        "ar": width / height if settings.aspect_ratio_as_trained else height / width,
        "fps": IMAGE_FPS if settings.num_frames == 1 else settings.fps,
    }
    return {name: torch.full((count,), float(value), device="cpu") for name, value in values.items()}


def _make_generator(*key: int) -> torch.Generator:
    [seed] = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))


def make_tasks(
    prompts: Sequence[str],
    reference_paths: Sequence[str | None] | None,
    mask_strategies: Sequence[str | None] | None,
    settings: SampleSettings,
) -> list[_Task]:
    """Parse the prompts of `VideoGenerator.stream`; ValueError for a mistake in one."""
    for name, values in (("reference_path", reference_paths), ("mask_strategy", mask_strategies)):
        if values is not None and len(values) != len(prompts):
            raise ValueError(
                f"{name} has {len(values)} entries for {len(prompts)} prompts; give one for each, None for no reference"
            )
    tasks = []
    for place, text in enumerate(prompts):
        index = settings.first_index + place
        prompt = parse_prompt(text, settings.loop)
        paths = prompt.reference_path or (reference_paths[place] if reference_paths else None)
        strategy = prompt.mask_strategy or (mask_strategies[place] if mask_strategies else None)
        try:
            tasks.append(_make_task(index, prompt, paths, strategy, settings))
        except ValueError as error:
            raise _name_prompt(index, prompt, error) from error
    return tasks


def _make_task(index: int, prompt: Prompt, paths: str | None, strategy: str | None, settings: SampleSettings) -> _Task:
    files = tuple(path.strip() for path in paths.split(";")) if paths else ()
    placements = parse_mask_strategy(strategy)
    if files and not placements:
        raise ValueError(f'reference_path {paths!r} would not be used without a mask_strategy; add one, such as "0"')
    for file in files:
        if not Path(file).is_file():
            hint = "download it first and give the file" if "://" in file else "check the path"
            raise ValueError(f"reference_path: there is no file {file!r}; {hint}")
    # A latent stands for one frame, so their numbers are the same.
    check_placements(placements, len(files), settings.loop, settings.num_frames)
    return _Task(index, prompt, files, placements)


def _name_prompt(index: int, prompt: Prompt, error: ValueError) -> ValueError:
    text = prompt.text if len(prompt.text) <= 40 else prompt.text[:37] + "..."
    return ValueError(f"prompt {index} ({text!r}): {error}")
