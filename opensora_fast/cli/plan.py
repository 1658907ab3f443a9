"""Plan a run on several GPUs: what fits into memory, how long processes wait for each other, tokens per second."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opensora_fast.cli._options import TRAINING_CONFIG_HELP, Overrides

if TYPE_CHECKING:
    from opensora_fast.benchmarks.report.step_rows import StepRows
    from opensora_fast.costs.hardware import Gpu
    from opensora_fast.costs.step_time import StepTime
    from opensora_fast.train.costs import RunCosts

ASSUMED_GPU = "H200"


def command(
    config: Annotated[Path, typer.Argument(help=TRAINING_CONFIG_HELP)],
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of processes, one a GPU.")] = 1,
    data_path: Annotated[str | None, typer.Option(help="Table of clips, .csv or .parquet.")] = None,
    mix: Annotated[
        Path | None,
        typer.Option(
            help="In place of a table: .csv or .json of resolution, frames, aspect_ratio (or none), clips or share."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"A100, H100, H800, H200, B200, H100 PCIe, …; that of the rows, of this machine, or {ASSUMED_GPU}."
        ),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Folder of benchmark rows to fit times to; committed ones of such a GPU if any.")
    ] = None,
    linear: Annotated[
        str, typer.Option(help="torch or quack: what multiplies in the Linears on all tokens, for the memory it needs.")
    ] = "torch",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; memory in bytes.")] = False,
) -> None:
    """Plan a run on several GPUs: what fits into memory, how long processes wait for each other, tokens per second.

    Needs no GPU. Memory is counted from what the kernels keep for backward. Times are fitted to measured training steps
    where there are benchmark rows of the GPU; otherwise they are a counted limit that nothing reaches, and say so.
    Micro-batches come from --data-path, from --mix, or are assumed: as many of every entry of bucket_config.
    """
    from opensora_fast.config import load_train_config
    from opensora_fast.data.buckets.bucket import Bucket
    from opensora_fast.kernels.linear import LINEAR_BACKENDS
    from opensora_fast.parallel.join import count_replicas
    from opensora_fast.train.checks import check_choice
    from opensora_fast.train.costs import RunCosts
    from opensora_fast.train.locate_config import locate_config
    from opensora_fast.train.planning.cluster_plan import make_plan
    from opensora_fast.train.planning.mix import mix_assumed, mix_of_file, mix_of_table

    if data_path is not None and mix is not None:
        raise ValueError("--data-path and --mix both say what the micro-batches are: give one")
    check_choice("--linear", linear, LINEAR_BACKENDS)
    options = {"dataset.data_path": data_path and os.path.abspath(data_path)}
    settings = load_train_config(locate_config(config), overrides or [], options).config
    replicas = count_replicas(world_size, settings.sp_size)
    bucket = Bucket(settings.bucket_config)
    costs = RunCosts(settings, bucket, linear)
    if mix is not None:
        micro_batches = mix_of_file(mix, settings, bucket, replicas)
    elif settings.dataset.data_path is not None:
        micro_batches = mix_of_table(settings, replicas)
    else:
        micro_batches = mix_assumed(settings, bucket)
    time, memory_ratios, gpu_note, notes = _choose_time(costs, gpu, rows)
    plan = make_plan(
        costs,
        config.stem,
        world_size,
        time,
        micro_batches,
        gpu_note=gpu_note,
        memory_ratios=memory_ratios,
        notes=notes,
    )
    print(json.dumps(plan.to_dict(), indent=2) if as_json else plan.to_text())


def _choose_time(
    costs: "RunCosts", gpu_name: str | None, folder: Path | None
) -> tuple["StepTime", list[float], str, list[str]]:
    """The model of a step's time, measured over counted memory, how the GPU was chosen, and notes."""
    from opensora_fast.benchmarks.report.step_rows import find_committed_rows, read_step_rows
    from opensora_fast.costs.hardware import find_gpu
    from opensora_fast.costs.step_time import FEWEST_ROWS, StepTime, fit_step_time

    dtype = {2: "bfloat16", 4: "float32"}[costs.element]
    model, memory = costs.model, costs.get_memory_model(world_size=1)
    given = find_gpu(gpu_name) if gpu_name is not None else None
    if folder is not None:
        measured = read_step_rows(folder, model, dtype)
        gpu = given or measured.gpu
        if not gpu.is_like(measured.gpu):
            raise ValueError(
                f"--rows {folder} are of {measured.gpu.name}, --gpu is {gpu.name}: give rows of {gpu.name}, or "
                f"--gpu {measured.gpu.name}"
            )
        if len(measured.rows) < FEWEST_ROWS:
            hint = "`opensora-fast bench --suite step` measures the published model"
            raise ValueError(f"--rows {_describe_too_few(measured, costs)}; {hint}")
        time = fit_step_time(gpu, measured.list_steps(model, costs.element), measured.gpu.name)
        return time, measured.compare_memory(memory), "", []
    gpu, gpu_note = (given, "") if given else _choose_gpu()
    committed = find_committed_rows(gpu)
    if committed is None:
        return StepTime(gpu), [], gpu_note, []
    measured = read_step_rows(committed, model, dtype)
    if len(measured.rows) < FEWEST_ROWS:
        return StepTime(gpu), [], gpu_note, [_describe_too_few(measured, costs)]
    time = fit_step_time(gpu, measured.list_steps(model, costs.element), measured.gpu.name)
    return time, measured.compare_memory(memory), gpu_note, []


def _describe_too_few(measured: "StepRows", costs: "RunCosts") -> str:
    from opensora_fast.costs.step_time import FEWEST_ROWS

    model = f"{costs.model.hidden_size} channels, {costs.model.depth} blocks, {costs.config.dtype}"
    steps = f"{len(measured.rows)} training step{'s' * (len(measured.rows) != 1)} on {measured.gpu.name}"
    return (
        f"{measured.folder} has {steps} of this model ({model}), too few for a fit, which takes {FEWEST_ROWS} of "
        "different shapes"
    )


def _choose_gpu() -> tuple["Gpu", str]:
    """This machine's GPU, with the memory that it has, or the assumed one."""
    import torch

    from opensora_fast.costs.hardware import find_gpu, recognize_gpu

    here = recognize_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if here is not None:
        return replace(here, memory=torch.cuda.get_device_properties("cuda").total_memory), "this machine's"
    return find_gpu(ASSUMED_GPU), "assumed, as --gpu is not given"
