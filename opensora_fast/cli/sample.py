"""Generate videos and images from prompts and references."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from opensora_fast.cli._options import SAMPLING_CONFIG_HELP, Overrides

MULTIPLE_VALUES = ("--prompt", "--reference-path", "--mask-strategy")
TAKES_OVERRIDES = True


def command(
    config: Annotated[Path, typer.Argument(help=SAMPLING_CONFIG_HELP)],
    overrides: Overrides = None,
    ckpt_path: Annotated[
        str | None,
        typer.Option(
            help="Weights: a model folder, a hub id, the output folder of a training run, or a checkpoint or file, "
            "Open-Sora's too."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help='Texts; may hold "|0|text|4|text" for loops and a JSON suffix with references.'),
    ] = None,
    prompt_path: Annotated[Path | None, typer.Option(help="File with one prompt a line.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of one loop; 1 is an image.")] = None,
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="H W", help="Height and width in pixels; multiples of 8, or those below are made."),
    ] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second that the model is told.")] = None,
    reference_path: Annotated[
        list[str] | None, typer.Option(help='For each prompt its images and videos, joined by ";"; "" for none.')
    ] = None,
    mask_strategy: Annotated[
        list[str] | None,
        typer.Option(
            help='For each prompt where they go: "loop,reference,reference_start,target_start,length,edit_ratio;...". '
            '"0" starts with the reference.'
        ),
    ] = None,
    loop: Annotated[
        int | None, typer.Option(help="Loops in all: each goes on from the last frames of the one before.")
    ] = None,
    condition_frame_length: Annotated[
        int | None, typer.Option(help="How many last frames a loop goes on from.")
    ] = None,
    num_sampling_steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal samples.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts sampled at a time.")] = None,
    num_sample: Annotated[int | None, typer.Option(help="Samples of each prompt.")] = None,
    start_index: Annotated[
        int | None, typer.Option(help="First prompt of the list; names and samples are as without it.")
    ] = None,
    end_index: Annotated[int | None, typer.Option(help="End of the prompts, not included.")] = None,
    sample_name: Annotated[str | None, typer.Option(help='Files are NAME_0.mp4, ...; "sample" if not given.')] = None,
    prompt_as_path: Annotated[bool, typer.Option("--prompt-as-path", help="Name files after their prompt.")] = False,
    save_dir: Annotated[Path | None, typer.Option(help="Folder for the samples.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")] = None,
) -> None:
    """Generate videos and images: from text, from an image, extended, connected or edited.

    Several GPUs compute each video together where torchrun starts a process for each, as for train; their number must
    divide that of the model's heads, 16.

    The paths of the files written are printed, one a line.
    """
    from opensora_fast.config import load_sample_config
    from opensora_fast.parallel.join import read_place
    from opensora_fast.sampling.prompts import read_prompts
    from opensora_fast.train.locate_config import locate_config

    if prompt_path is not None:
        if prompt is not None:
            raise ValueError("--prompt gives the prompts and --prompt-path a file with them: give one of the two")
        prompt = read_prompts(prompt_path)  # goes before a prompt of the configuration
    options = {
        "model.from_pretrained": ckpt_path,
        "prompt": prompt,
        "num_frames": num_frames,
        "image_size": image_size,
        "fps": fps,
        "reference_path": reference_path and [path or None for path in reference_path],
        "mask_strategy": mask_strategy and [strategy or None for strategy in mask_strategy],
        "loop": loop,
        "condition_frame_length": condition_frame_length,
        "scheduler.num_sampling_steps": num_sampling_steps,
        "scheduler.cfg_scale": cfg_scale,
        "seed": seed,
        "batch_size": batch_size,
        "num_sample": num_sample,
        "start_index": start_index,
        "end_index": end_index,
        "sample_name": sample_name,
        "prompt_as_path": prompt_as_path or None,
        "save_dir": save_dir and str(save_dir),
    }
    loaded = load_sample_config(locate_config(config), overrides or [], options)

    def report(note: str) -> None:
        if read_place(os.environ).rank == 0:
            print(f"note: {note}", file=sys.stderr)

    for note in loaded.notes:
        report(note)

    from opensora_fast.sampling.run import run_sampling
    from opensora_fast.train.checkpoints.sample_from import sample_from_run

    sample_from_run(loaded.config, report)
    for path in run_sampling(loaded.config, device):
        print(path)
