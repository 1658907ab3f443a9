"""Train ST-DiT-2 from a configuration."""

import os
from pathlib import Path
from typing import Annotated

import typer

from opensora_fast.cli._options import TRAINING_CONFIG_HELP, Overrides


def command(
    config: Annotated[Path, typer.Argument(help=TRAINING_CONFIG_HELP)],
    overrides: Overrides = None,
    data_path: Annotated[str | None, typer.Option(help="Table of clips, .csv or .parquet.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Output folder of the run.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Stop after so many steps in all.")] = None,
    resume: Annotated[str | None, typer.Option(help="auto, or a checkpoint or run to continue.")] = None,
    init_from: Annotated[
        str | None,
        typer.Option(help="Weights to start from: a run, a checkpoint, a folder or file of weights, or a hub id."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    kernels: Annotated[str, typer.Option(help="triton, reference or auto: triton on cuda only.")] = "auto",
    linear: Annotated[
        str, typer.Option(help="torch or quack: what multiplies in the Linears on all tokens.")
    ] = "torch",
    trace_steps: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Write a trace of these steps, for ui.perfetto.dev.")
    ] = None,
    memory_history: Annotated[
        bool, typer.Option("--memory-history", help="Keep where GPU memory is asked for, until it runs out.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print configuration and buckets, and exit.")] = False,
) -> None:
    """Train ST-DiT-2 from a configuration.

    Writes to the output folder: metrics.jsonl (one object a step), checkpoints/ (weights, their average, optimizer
    state), config.json, encoders/ (what was fitted on the data), bad_clips.jsonl and kernels.json. Ctrl-C stops after
    the step, with a checkpoint; --resume auto continues.

    Several GPUs train together, each on micro-batches of its own, where torchrun starts a process for each:

        torchrun --standalone --nproc-per-node 8 -m opensora_fast train CONFIG ...

    With sp_size=4 four consecutive processes compute each micro-batch together (sequence parallelism), each some of
    its frames, for videos that do not fit into the memory of one GPU.

    Of a step of several micro-batches metrics.jsonl has the mean of the losses, the sum of tokens and clips
    (batch_size), the tokens a second of all, the longest data_wait and the most memory of any process; bucket is that
    of the first micro-batch, buckets has all.

    To watch a run: tensorboard=True writes the numbers of metrics.jsonl to DIR/tensorboard, too, for `tensorboard
    --logdir DIR`; wandb=True shows them at Weights & Biases, or with WANDB_MODE=offline writes to DIR/wandb what `wandb
    sync` sends later. --trace-steps 10:13 writes what host and GPU do in the steps 10 to 13 to DIR/traces; Nsight
    Systems shows the steps and their parts as NVTX ranges. Where a step does not fit into the GPU's memory,
    DIR/out_of_memory.txt says what is there, and with --memory-history out_of_memory.pickle from where in the code, for
    pytorch.org/memory_viz.
    """
    from opensora_fast.config import load_train_config
    from opensora_fast.train.locate_config import locate_config
    from opensora_fast.train.monitoring.trace import parse_trace_steps

    traced = None if trace_steps is None else parse_trace_steps(trace_steps)
    options = {"dataset.data_path": data_path and os.path.abspath(data_path), "steps": steps}
    loaded = load_train_config(locate_config(config), overrides or [], options)
    if dry_run:
        from opensora_fast.train.dry_run import print_plan

        print_plan(loaded, device, kernels, linear, traced, memory_history, out, resume, init_from)
        return
    if out is None:
        raise ValueError("--out is missing: the folder for metrics, checkpoints and all that the run writes")
    from opensora_fast.train.train import train

    signal_number = train(
        loaded,
        out,
        resume=resume,
        init_from=init_from,
        device=device,
        backend=kernels,
        linear=linear,
        trace_steps=traced,
        memory_history=memory_history,
    )
    if signal_number is not None:
        raise typer.Exit(128 + signal_number)
