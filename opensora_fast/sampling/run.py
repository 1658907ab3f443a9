"""A sampling run as a configuration describes it: which prompts, and the files that come out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from opensora_fast.config import SampleConfig
from opensora_fast.cpu_threads import cpu_threads
from opensora_fast.data.reporting import print_line
from opensora_fast.diffusion.dpm_solver import NO_GIVEN_FRAMES
from opensora_fast.out_of_memory import naming_out_of_memory
from opensora_fast.parallel.join import join_processes, read_place
from opensora_fast.sampling.build import build_generator, make_settings
from opensora_fast.sampling.generate import Sample, make_tasks
from opensora_fast.sampling.prompts import read_prompts

MAX_NAME_BYTES = 200  # file systems take 255, and an ending and a number follow
Entry = TypeVar("Entry")


def run_sampling(config: SampleConfig, device: str | None = None) -> Iterator[Path]:
    """Generate everything a configuration asks for; gives the path of each file once it is written.

    Where torchrun has started several processes, the model's work on each video is shared out among them, and rank 0
    writes the files: the others give no path.

    Raises:
        ValueError: no prompt, no save_dir, no such device, or whatever `VideoGenerator` finds wrong. What the prompts,
            the folder and the device show is found before any weights are loaded. Also where the memory of a GPU runs
            out.
    """
    if not config.save_dir:
        raise ValueError("there is no folder for the samples; give --save-dir or save_dir")
    folder = Path(config.save_dir)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"save_dir {folder}: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"save_dir {folder} cannot be written to; give another folder")
    all_prompts = choose_prompts(config)
    references = _slice(config, "reference_path", config.reference_path, all_prompts)
    strategies = _slice(config, "mask_strategy", config.mask_strategy, all_prompts)
    prompts = _cut(config, all_prompts)
    tasks = make_tasks(prompts, references, strategies, make_settings(config))
    if config.scheduler.type == "dpm-solver" and any(
        placement.edit_ratio < 1 for task in tasks for placement in task.placements
    ):
        raise ValueError(NO_GIVEN_FRAMES)
    together = read_place(os.environ).world_size
    if together > 1 and config.cuda_graph_tokens:
        raise ValueError(
            f"cuda_graph_tokens={config.cuda_graph_tokens} and {together} processes: what they exchange is not "
            "recorded in CUDA graphs; use one of them"
        )
    with join_processes(device, together) as processes, cpu_threads(config.cpu_threads):
        with explain_weights_out_of_memory(config):
            generator = build_generator(config, processes.device)
        generator.model.share_frames(processes.sequence)
        if processes.rank == 0 and (note := describe_other_size(config, generator.video_encoder.patch_size)):
            print_line(f"note: {note}")
        written: set[str] = set()
        with explain_out_of_memory(config, min(config.batch_size, len(tasks)), together):
            for sample in generator.stream(prompts, references, strategies, progress=processes.rank == 0):
                if processes.rank != 0:
                    continue
                name = name_sample(sample, config)
                while name in written:  # prompts of one text, or long ones that begin alike
                    name = f"{name}_{sample.index}"
                written.add(name)
                yield sample.save(folder / name)


def explain_weights_out_of_memory(config: SampleConfig) -> AbstractContextManager[None]:
    """Load encoders and model; ValueError with what to change where a GPU's memory does not hold them."""
    fix = "take a GPU with more"
    if config.text_encoder.type == "t5" and not config.text_encoder.shardformer and config.dtype == "bf16":
        fix = f"text_encoder.shardformer=True keeps T5 in bf16, which takes half the memory of float32, or {fix}"
    return naming_out_of_memory(f"with the weights of encoders and model: {fix}")


def explain_out_of_memory(config: SampleConfig, videos: int, together: int) -> AbstractContextManager[None]:
    """Sample so many videos at a time in so many processes; ValueError with what to change where memory runs out."""
    height, width = config.image_size
    fixes = ["lower num_frames or image_size"]
    if videos > 1:
        fixes.insert(0, "lower batch_size")
    if config.vae.type == "VideoAutoencoderKL":
        now = config.vae.micro_batch_size or "all"
        fixes.append(f"lower vae.micro_batch_size, the frames that are encoded and decoded at a time (now {now})")
    if config.cuda_graph_tokens:
        fixes.append("spare the memory of CUDA graphs with cuda_graph_tokens=0")
    else:
        fixes.append(f"share each video among {'more' if together > 1 else 'several'} GPUs with torchrun")
    what = "1 video" if videos == 1 else f"{videos} videos at a time, each"
    return naming_out_of_memory(
        f"with {what} of {config.num_frames} frames of {height} x {width}: {', or '.join(fixes)}"
    )


def describe_other_size(config: SampleConfig, patch_size: tuple[int, int, int]) -> str | None:
    """What to say where image_size is not one of whole latent pixels; None where it is."""
    height, width = (size - size % patch for size, patch in zip(config.image_size, patch_size[1:], strict=True))
    if (height, width) == config.image_size:
        return None
    asked, pixel = (" x ".join(map(str, size)) for size in (config.image_size, patch_size[1:]))
    return (
        f"image_size {asked} is made as {height} x {width}, of whole latent pixels of {pixel}; the model is told "
        f"{asked}, as by Open-Sora"
    )


def choose_prompts(config: SampleConfig) -> list[str]:
    """All prompts of the configuration, before `start_index` and `end_index`; `prompt` goes before `prompt_path`."""
    if config.prompt:
        return config.prompt
    if config.prompt_path is None:
        raise ValueError("there is no prompt; give --prompt TEXT, or --prompt-path FILE with one prompt a line")
    return read_prompts(config.prompt_path)


def name_sample(sample: Sample, config: SampleConfig) -> str:
    """File name without ending: the prompt's number after `sample_name`, or the prompt, and the sample's number."""
    name = f"{config.sample_name or 'sample'}_{sample.index}"
    if config.prompt_as_path:
        text = re.sub(r'[\s/\\:*?"<>|\x00-\x1f]+', " ", sample.prompt).strip(" .")
        text = text.encode(errors="ignore")[:MAX_NAME_BYTES].decode(errors="ignore").strip()
        name = (config.sample_name or "") + (text or "sample")
    return f"{name}-{sample.copy}" if config.num_sample != 1 else name


def _cut(config: SampleConfig, entries: list[Entry]) -> list[Entry]:
    chosen = entries[config.start_index : config.end_index]
    if not chosen:
        raise ValueError(
            f"start_index {config.start_index} and end_index {config.end_index} leave none of {len(entries)} prompts"
        )
    return chosen


def _slice(config: SampleConfig, key: str, entries: list[Entry] | None, prompts: list[str]) -> list[Entry] | None:
    if entries is None:
        return None
    if len(entries) != len(prompts):
        raise ValueError(
            f"{key} has {len(entries)} entries for {len(prompts)} prompts; give one for each, None for no reference"
        )
    return _cut(config, entries)
