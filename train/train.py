"""Train from a configuration: put the parts together and run the loop, in each process that torchrun has started."""

import json
import os
import shlex
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from opensora_fast import use_kernels
from opensora_fast.config import LoadedConfig, TrainConfig, to_json
from opensora_fast.cpu_threads import cpu_threads
from opensora_fast.data.decoding.pyav_decoder import count_processors
from opensora_fast.device import DTYPES
from opensora_fast.diffusion import IDDPM, MaskGenerator
from opensora_fast.files import write_whole
from opensora_fast.folder_lock import hold_folder
from opensora_fast.kernels import calls
from opensora_fast.model import STDiT2
from opensora_fast.parallel.join import join_processes
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.checkpoints.start import (
    CHECKPOINT_CONFIG,
    Start,
    agree_on_start,
    check_changes,
    find_fitted,
    load_initial_weights,
    refuse_other_place,
)
from opensora_fast.train.checkpoints.state import Position, load_weights
from opensora_fast.train.checkpoints.state import resume as resume_state
from opensora_fast.train.checks import check_run
from opensora_fast.train.inputs.data import TrainingData, read_data
from opensora_fast.train.inputs.encoders import (
    adopt_fitted,
    copy_fitted,
    discard_fitted,
    needs_fit,
)
from opensora_fast.train.inputs.followers import find_batches
from opensora_fast.train.inputs.sources import Source, open_clips, open_features
from opensora_fast.train.loop import Limits, Trainer
from opensora_fast.train.monitoring.out_of_memory import (
    explain_parts_out_of_memory,
    keep_memory_history,
)
from opensora_fast.train.monitoring.trace import StepTrace
from opensora_fast.train.monitoring.trackers import open_trackers
from opensora_fast.train.optimizer.ema import EMA
from opensora_fast.train.optimizer.master_adamw import MasterAdamW
from opensora_fast.train.parts import build_diffusion, build_model, make_model_config
from opensora_fast.train.planning.memory_check import warn_of_memory
from opensora_fast.train.step.graphs import StepGraphs
from opensora_fast.train.step.losses import compute_losses


def train(
    loaded: LoadedConfig[TrainConfig],
    out: Path,
    *,
    resume: str | None = None,
    init_from: str | None = None,
    device: str | None = None,
    backend: str = "auto",
    linear: str = "torch",
    trace_steps: tuple[int, int] | None = None,
    memory_history: bool = False,
    report: Callable[[str], None] = print,
) -> int | None:
    """Train to the end of the configured steps or epochs.

    Started by torchrun as one of several processes, it trains one model together with the others; all must be able to
    read and write the same folders. Rank 0 makes what is made once (fitted encoders, cached features), writes what is
    written of a run, and reports.

    Args:
        loaded: the configuration.
        out: output folder of the run.
        resume: "auto" continues the newest complete checkpoint of `out` if there is one; a path continues that one.
        init_from: weights to start from, in place of `model.from_pretrained`.
        device: "cpu" or "cuda"; CUDA where there is one by default. Of several processes each takes its own GPU.
        backend: of every op: "triton", "reference", or "auto" (Triton on CUDA, reference elsewhere). The optimizer's
            step is never interpreted.
        linear: what multiplies in the Linears on all tokens: "torch" or "quack" (see `kernels.linear`).
        trace_steps: the first and the last step to be traced, see `StepTrace`.
        memory_history: have torch keep a history of the GPU's memory, to be written when a step does not fit into it.
        report: is given lines for a person.

    Returns:
        The number of the signal that stopped the run early, after a checkpoint, or None.

    Raises:
        ValueError: a mistake in the configuration, the data or the folder; NonFiniteError from the loop;
            ProcessLostError where another process has failed.
    """
    config = loaded.config
    with join_processes(device, config.sp_size) as processes, ExitStack() as held:
        if processes.rank != 0:
            report = _report_nothing
        check_run(config, processes.device, backend, linear, trace_steps, memory_history)
        for note in loaded.notes:
            report(f"note: {note}")
        diffusion = build_diffusion(config)
        masks = MaskGenerator(config.mask_ratios) if config.mask_ratios is not None else None
        data = read_data(config, processes.replica, processes.replicas)
        for warning in data.explanation.warnings:
            report(f"warning: {warning}")
        start = _prepare_folder(config, data, out, processes, resume, init_from, held, report)
        dtype = DTYPES[config.dtype]
        trainer: Trainer | None = None

        def tell(text: str) -> None:
            if trainer is None:
                report(text)
            else:
                trainer.note(text)

        open_source = open_clips if config.features is None else open_features
        sequence = processes.sequence
        with (
            cpu_threads(choose_cpu_threads(config, processes)),
            keep_memory_history(memory_history),
            ExitStack() as stack,
        ):
            source: Source | None = None
            # Rank 0 fits, downloads and writes features; the others find them.
            with processes.first(), explain_parts_out_of_memory("the encoders"):
                if sequence is None or sequence.rank == 0:
                    source = stack.enter_context(closing(open_source(config, data, out, processes.device, dtype, tell)))
            facts, batches = find_batches(source, sequence)
            model_config = make_model_config(config, **facts.model_keys)
            model = build_model(model_config, config.seed, config.grad_checkpoint)
            model.share_frames(sequence)
            use_kernels(model, backend, linear=linear)
            if start.weights is not None:
                with processes.first():
                    load_initial_weights(model, start.weights, report)
            with explain_parts_out_of_memory("weights, optimizer and average"):
                optimizer = MasterAdamW(
                    model,
                    dtype=dtype,
                    device=processes.device,
                    lr=config.lr,
                    grad_clip=config.grad_clip,
                    # On a GPU "triton" and "auto" are the same; an interpreter would take longer than the model.
                    backend="reference" if backend == "reference" else "auto",
                    processes=processes,
                )
                ema = EMA(optimizer, config.ema_decay)
            trainer = Trainer(
                model=model,
                optimizer=optimizer,
                ema=ema,
                diffusion=diffusion,
                masks=masks,
                inputs=None if source is None else source.inputs,
                batches=batches,
                extra_files=lambda folder: write_extra_files(config, out, folder),
                folder=out,
                replay=lambda checkpoint, step: describe_replay(out, checkpoint, step, processes, backend, linear),
                limits=Limits(
                    config.steps, config.epochs, config.log_every, config.ckpt_every, config.keep_checkpoints
                ),
                seed=config.seed,
                data_fingerprint=facts.fingerprint,
                graphs=make_graphs(config, model, diffusion),
                trace=None if trace_steps is None else StepTrace(trace_steps, out, processes, tell),
                memory_history=memory_history,
            )
            if start.resume is not None:
                resume_state(trainer, start.resume)
            elif start.state is not None:
                load_weights(trainer, start.state)
            if processes.rank == 0:
                trainer.trackers = stack.enter_context(open_trackers(config, out, trainer.position.step, tell))
                write_config(config, out / "config.json")
            report(describe_run(trainer, facts.steps, start))
            if config.steps is not None and 0 < config.steps <= trainer.position.step:
                report(f"note: no step is left to train: `steps` or --steps is {config.steps}, and counts all of a run")
            if source is not None:
                warn_of_memory(config, source.data, processes.world_size, trainer.model.device, report, linear)
            calls_before = calls.copy()
            steps_left = None if source is None else count_steps_left(config, source.data, trainer.position)
            signal_number = trainer.run(steps_left)
        if processes.rank == 0:
            report_kernels(calls - calls_before, out, report)
            if trainer.graphs is not None:
                report(trainer.graphs.describe())
        report(f"step {trainer.position.step}: {trainer.last_checkpoint or start.resume}")
        if signal_number is not None:
            report(f"stopped by signal {signal_number}; --resume auto continues")
        return signal_number


def _prepare_folder(
    config: TrainConfig,
    data: TrainingData,
    out: Path,
    processes: Processes,
    resume: str | None,
    init_from: str | None,
    held: ExitStack,
    report: Callable[[str], None],
) -> Start:
    """Make the run's folder, hold it until `held` is closed, and find where to start from. ValueError as of `train`."""
    refuse_other_place(out)
    # Before its checkpoints are looked at: another run that writes there would change them meanwhile.
    if held_before := processes.rank == 0 and out.is_dir():
        held.enter_context(hold_folder(out, report))
    start = agree_on_start(processes, config, out, resume, init_from, report)
    if start.resume is not None:
        check_changes(start.resume, config, data, processes.world_size, processes.replicas, report)
    if needs_fit(config):
        find_fitted(start, out)  # for its refusal, before anything is written

    with processes.first():
        out.mkdir(parents=True, exist_ok=True)
        if processes.rank == 0 and not held_before:
            held.enter_context(hold_folder(out, report))
        if needs_fit(config):
            if processes.rank == 0 and start.resume is None:
                discard_fitted(out, report)
            if start.origin is not None:
                adopt_fitted(start.origin, out)
    return start


def _report_nothing(text: str) -> None:
    """What processes other than rank 0 report: rank 0 has said it."""


def count_steps_left(config: TrainConfig, data: TrainingData, position: Position) -> int | None:
    """How many steps it takes from a position until `steps` or `epochs` end the run; None where that is not known."""
    to_epochs = data.sampler.count_steps_left(config.epochs, position.epoch, position.consumed)
    if config.steps is None:
        return to_epochs
    to_steps = max(0, config.steps - position.step)
    if to_epochs is None:
        # Draws change the length of an epoch, but do not halve that of many.
        about = (config.epochs - position.epoch) * data.explanation.steps
        return to_steps if about >= 2 * to_steps else None
    return min(to_steps, to_epochs)


def make_graphs(config: TrainConfig, model: STDiT2, diffusion: IDDPM) -> StepGraphs | None:
    """What replays the small steps of a configuration, with the model on its device; None where it asks for none."""
    if not config.cuda_graph_tokens:
        return None
    return StepGraphs(model, partial(compute_losses, model, diffusion), config.cuda_graph_tokens)


def choose_cpu_threads(config: TrainConfig, processes: Processes) -> int | None:
    """Threads of one operation on the CPU: as configured; otherwise several processes share the processors of their
    machine, in place of the one thread each that torchrun sets."""
    if config.cpu_threads is not None or processes.world_size == 1:
        return config.cpu_threads
    return max(1, count_processors() // processes.local_world_size)


def write_extra_files(config: TrainConfig, out: Path, folder: Path) -> None:
    """Add to a checkpoint what is needed to use it without its run."""
    write_config(config, folder / CHECKPOINT_CONFIG)
    if needs_fit(config):
        copy_fitted(out, folder)


def write_config(config: TrainConfig, path: Path) -> None:
    """Write the effective configuration; paths of data are made absolute, so that it works from any folder."""
    absolute = config.model_copy(deep=True)
    if absolute.dataset.data_path is not None:
        absolute.dataset.data_path = os.path.abspath(absolute.dataset.data_path)
    if absolute.features is not None:
        absolute.features = os.path.abspath(absolute.features)
    write_whole(path, to_json(absolute) + "\n")


def describe_replay(
    out: Path, checkpoint: Path, step: int, processes: Processes, backend: str = "auto", linear: str = "torch"
) -> str:
    """The command that runs one step again, from the checkpoint before it, into another folder, as it was run."""
    words = ["opensora-fast"]
    if processes.world_size > 1:
        machines = processes.world_size // processes.local_world_size
        where = ["--standalone"] if machines == 1 else ["--nnodes", str(machines)]
        words = ["torchrun", *where, "--nproc-per-node", str(processes.local_world_size), "-m", "opensora_fast"]
    words += ["train", str(out / "config.json"), "--resume", str(checkpoint)]
    words += ["--out", f"{out}-replay-{step}", "--steps", str(step), "--device", processes.device.type]
    words += ["--kernels", backend] if backend != "auto" else []
    words += ["--linear", linear] if linear != "torch" else []
    return shlex.join(words)


def describe_run(trainer: Trainer, steps_per_epoch: int, start: Start) -> str:
    """One line on what is about to be trained."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    trained = sum(shape.numel() for shape in trainer.optimizer.shapes.values())
    count = trainer.processes.world_size
    where = str(trainer.model.device) if count == 1 else f"{count} processes on {trainer.model.device.type}"
    begins = "from the start" if trainer.position.step == 0 else f"after step {trainer.position.step} of {start.resume}"
    return (
        f"model: {parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained, {trainer.model.dtype} on "
        f"{where}; {steps_per_epoch} steps an epoch; {begins}"
    )


def report_kernels(called: Counter[tuple[str, str]], out: Path, report: Callable[[str], None]) -> None:
    """List the ops that ran and how often, for a person and, where a step was taken, in `DIR/kernels.json`."""
    rows = [{"op": op, "backend": backend, "calls": count} for (op, backend), count in sorted(called.items())]
    if rows:
        write_whole(out / "kernels.json", json.dumps(rows, indent=1) + "\n")
    report(
        "ops called: " + (", ".join(f"{row['op']} ({row['backend']}, {row['calls']} times)" for row in rows) or "none")
    )
