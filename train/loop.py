"""The training loop: batches in, optimizer steps, metrics and checkpoints out.

A step never asks the GPU for a number it has to wait for. The loss is copied to the host while backward is queued, and
read before the optimizer runs, so a loss that is not finite changes nothing. The gradient norm is read one step later:
a step whose gradient is not finite is skipped on the device itself (see `MasterAdamW`). Either way the run stops with
the weights of the step before. So the row of a step is written during the next one, or when that one ends with an
error. A checkpoint is a copy on the host, which a thread writes while the loop goes on.

Several processes tell each other their losses at the same place, while their GPUs do backward, and with them whether a
signal has come: so all stop before the same step, or after it. By then each has begun to average all its gradients, so
none waits for what a stopped one has not begun. They also wait for each other's batches, before any begins a step.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from opensora_fast.data.batch import Batch
from opensora_fast.device import count_memory_retries
from opensora_fast.diffusion import IDDPM, MaskGenerator
from opensora_fast.model import STDiT2
from opensora_fast.parallel.collectives import ProcessLostError, do_all
from opensora_fast.parallel.processes import Processes
from opensora_fast.progress import Progress
from opensora_fast.train.checkpoints.background import Background
from opensora_fast.train.checkpoints.checkpoint import get_step, locate_step, write_checkpoint
from opensora_fast.train.checkpoints.state import Position, collect_state, take_snapshot, write_state
from opensora_fast.train.inputs.model_inputs import ModelInputs
from opensora_fast.train.monitoring.metrics import METRICS, MetricsWriter, count_batch_tokens, join_parts, peak_memory
from opensora_fast.train.monitoring.not_finite import NonFiniteError, describe_batches, find_not_finite, write_report
from opensora_fast.train.monitoring.out_of_memory import explain_out_of_memory
from opensora_fast.train.monitoring.ranges import named_range
from opensora_fast.train.monitoring.step_rows import StepRows
from opensora_fast.train.monitoring.trace import StepTrace
from opensora_fast.train.monitoring.trackers import Trackers
from opensora_fast.train.optimizer.ema import EMA
from opensora_fast.train.optimizer.master_adamw import MasterAdamW
from opensora_fast.train.step.graphs import StepGraphs
from opensora_fast.train.step.host_values import HostValues
from opensora_fast.train.step.losses import compute_losses, draw_inputs
from opensora_fast.train.step.randomness import seed_step
from opensora_fast.train.stop import StopSignals

# With keep probabilities below 1 every clip of a tiny table may lose its draw; that many times in a row is a mistake.
EMPTY_EPOCHS = 100
# How long the numbers of a finished step are waited for when the run has ended with an error. On a device that waits
# for a process that is lost they never come.
SECONDS_AFTER_ERROR = 10


@dataclass
class Limits:
    """When to stop, log and save."""

    steps: int | None
    epochs: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int


@dataclass
class Taken:
    """A step whose gradient norm has not been read yet."""

    step: int
    batch: Batch
    norm: HostValues
    row: dict[str, Any]


@dataclass
class Trainer:
    """Everything a run needs, and the loop over it. Of several processes each has one, and rank 0 writes the files.

    Args:
        model: in train mode, on its device, in its working dtype.
        optimizer: owns the weights, and knows the processes of the run.
        ema: average of the weights.
        diffusion: IDDPM or SpeeDiffusion.
        masks: None for no masks.
        inputs: turns a batch into latents and conditioning; None where another process does and shares them.
        batches: batches(epoch, consumed) yields the batches of one epoch from that position on.
        extra_files: writes further files into a checkpoint folder (configuration, encoders).
        folder: output folder of the run.
        replay: replay(checkpoint, step) is the command that runs the step again.
        limits: when to stop, log and save.
        graphs: replays small steps; None computes all as they come.
        seed: of the run.
        data_fingerprint: says whether a checkpoint's order of batches is that of this run.
        trackers: are given every row of metrics, on rank 0.
        trace: records some steps; None for none.
        memory_history: whether torch keeps a history of the GPU's memory, to be written when a step does not fit.

    Attributes:
        background: writes the checkpoints.
    """

    model: STDiT2
    optimizer: MasterAdamW
    ema: EMA
    diffusion: IDDPM
    masks: MaskGenerator | None
    inputs: ModelInputs | None
    batches: Callable[[int, int], Iterator[Batch]]
    extra_files: Callable[[Path], None]
    folder: Path
    replay: Callable[[Path, int], str]
    limits: Limits
    seed: int
    data_fingerprint: str
    graphs: StepGraphs | None = None
    trackers: Trackers = field(default_factory=Trackers)
    trace: StepTrace | None = None
    memory_history: bool = False
    position: Position = field(default_factory=Position)
    last_checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self.background = Background(self.note)
        self._buffers: dict[str, Tensor] = {}
        self._progress: Progress | None = None
        self._rows: StepRows | None = None
        self._taken: Taken | None = None
        self._signal: int | None = None

    @property
    def processes(self) -> Processes:
        return self.optimizer.processes

    def run(self, steps_left: int | None = None) -> int | None:
        """Train to the end. Returns the number of the signal, to any process, that stopped the run before it, or None.

        Args:
            steps_left: to be shown as the total; None where it is not known.

        Raises:
            NonFiniteError: after a checkpoint of the step before and `nonfinite.json` have been written; or without
                them, where the checkpoint cannot be.
            ValueError: there are no batches, or a batch does not fit into memory.
        """
        first = self.position.step
        with StopSignals() as stop, contextlib.ExitStack() as stack:
            if self.processes.rank == 0:
                metrics = stack.enter_context(contextlib.closing(MetricsWriter(self.folder / METRICS, last_step=first)))
                self._progress = stack.enter_context(Progress("train", total=steps_left, unit="steps"))
                self._rows = StepRows(metrics, self.trackers, self._progress, self.limits.log_every)
            try:
                with self.background:
                    with contextlib.closing(self._iterate()) as batches, self.trace or contextlib.nullcontext():
                        stopped_by = self._take_steps(batches, stop)
                    self.save()
                    self.finish_saving()
            except BaseException:
                self._finish_after_error()
                raise
            return stopped_by

    def note(self, text: str) -> None:
        """Tell a person one line, without disturbing the progress bar."""
        if self._progress is not None:
            self._progress.note(text)
        else:
            rank = self.processes.rank
            print(text if rank == 0 else f"rank {rank}: {text}", file=sys.stderr)

    def save(self) -> None:
        """Begin a checkpoint of the present position, unless the last one is of it; every step taken must have been
        finished.

        The state is copied now, and written while training goes on. `last_checkpoint` names it from now on.
        """
        if self.last_checkpoint is not None and get_step(self.last_checkpoint) == self.position.step:
            return
        self.finish_saving()
        with named_range("copy for checkpoint", self.model.device):
            snapshot, step = take_snapshot(self, self._buffers), self.position.step
        parent = self.folder / "checkpoints"
        collected = collect_state(self.optimizer, snapshot)

        def fill(folder: Path) -> None:
            write_state(self, snapshot, collected, folder)
            self.extra_files(folder)

        def write() -> None:
            try:
                write_checkpoint(parent, step, fill, self.limits.keep_checkpoints)
            except BaseException:
                # The disk is full, or a process is lost: the others wait until their shards have been taken.
                with contextlib.suppress(ProcessLostError):
                    do_all(collected)
                raise

        self.background.start(write if self.processes.rank == 0 else lambda: do_all(collected))
        self.last_checkpoint = locate_step(parent, step)

    def finish_saving(self) -> None:
        """Wait until this process has done its part of the last checkpoint that was begun.

        Raises:
            ValueError: it could not be written.
        """
        self.background.wait()

    def compute_losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """`loss` and its parts, each [] on the device, for a batch at a step; draws all randomness of the step."""
        seed_step(self.seed, step, self.processes.replica)
        inputs = None
        with named_range("inputs", self.model.device):
            if self.inputs is not None:
                inputs = draw_inputs(self.model, self.diffusion, self.masks, *self.inputs.prepare(batch))
                # Decoded clips may lie on the GPU, and a batch is kept until the step behind its own is computed.
                batch.drop_content()
            if self.processes.sequence is not None:
                inputs = self.processes.sequence.share(inputs, self.model.device)
        with named_range("forward", self.model.device):
            if self.graphs is not None:
                return self.graphs.compute_losses(inputs)
            return compute_losses(self.model, self.diffusion, inputs)

    def _take_steps(self, batches: Iterator[Batch], stop: StopSignals) -> int | None:
        """All that are left. Returns the number of the signal that ended them, or None."""
        stopped_by = None
        while self.limits.steps is None or self.position.step < self.limits.steps:
            if (stopped_by := self._find_signal(stop)) is not None:
                break
            if self.trace is not None:
                self.trace.reach(self.position.step + 1)
            started = time.perf_counter()
            with named_range(f"step {self.position.step + 1}", self.model.device):
                with named_range("wait for batch", self.model.device):
                    batch = next(batches, None)
                if batch is None:
                    if self.trace is not None:
                        self.trace.miss()
                    break
                data_wait = time.perf_counter() - started
                self.processes.gather(None)  # all have their batches
                with self._explain_out_of_memory(batch):
                    taken = self._take_step(batch, data_wait, stop)
            row = taken.row
            row["step_time"] = time.perf_counter() - started
            row["tokens_per_s"] = row["tokens"] / row["step_time"]
            row["memory"] = max(row["memory"], peak_memory(self.model.device))
            self._taken = taken
            self.position.step += 1
            self.position.consumed = self._first_index(batch) + self.processes.replicas
            if self.limits.checkpoint_every and self.position.step % self.limits.checkpoint_every == 0:
                self._finish()
                self.save()
            self.background.check()
        self._finish()
        return stopped_by

    def _find_signal(self, stop: StopSignals) -> int | None:
        """The signal that stops the run: one process need not wait for the others to know of it."""
        return stop.received if self.processes.world_size == 1 else self._signal

    def _first_index(self, batch: Batch) -> int:
        """Number in the epoch of the first of the micro-batches that the processes take in a step."""
        return batch.index - self.processes.replica

    def _iterate(self) -> Iterator[Batch]:
        empty_epochs = 0
        while self.position.epoch < self.limits.epochs:
            yield from self.batches(self.position.epoch, self.position.consumed)
            empty_epochs = 0 if self.position.consumed else empty_epochs + 1
            if empty_epochs == EMPTY_EPOCHS:
                raise ValueError(f"{EMPTY_EPOCHS} epochs in a row have no batch: raise the keep probabilities")
            self.position.epoch += 1
            self.position.consumed = 0

    def _take_step(self, batch: Batch, data_wait: float, stop: StopSignals) -> Taken:
        step = self.position.step + 1
        losses = self.compute_losses(batch, step)
        values = HostValues(*losses.values())
        with named_range("backward", self.model.device):
            if self.graphs is not None:
                self.graphs.backward(losses)
            else:
                losses["loss"].backward()
            self.optimizer.begin_step()
        with named_range("wait for losses", self.model.device):
            own_losses = dict(zip(losses, values.get(), strict=True))
            told = self.processes.gather(self._describe(batch, own_losses, data_wait, stop))
        self._finish()
        if not all(math.isfinite(process["losses"]["loss"]) for process in told):
            self._stop_not_finite("loss", own_losses["loss"], step, batch)
        self._signal = next((process["signal"] for process in told if process["signal"] is not None), None)
        row = {"step": step, **join_parts(told, self.processes.replicas), "lr": self.optimizer.lr}
        row |= {"epoch": batch.epoch, "micro_batch": self._first_index(batch)}
        with named_range("optimizer", self.model.device):
            norm = HostValues(self.optimizer.step(self.ema))
        return Taken(step, batch, norm, row)

    def _explain_out_of_memory(self, batch: Batch) -> contextlib.AbstractContextManager[None]:
        graphs, step = self.graphs is not None, self.position.step + 1
        tokens = count_batch_tokens(batch, self.model.patch)
        return explain_out_of_memory(batch, tokens, step, graphs, self.folder, self.processes, self.memory_history)

    def _describe(self, batch: Batch, losses: dict[str, float], data_wait: float, stop: StopSignals) -> dict[str, Any]:
        """What the other processes should know of this one's part of a step."""
        return {
            "losses": losses,
            "tokens": count_batch_tokens(batch, self.model.patch),
            "clips": len(batch),
            "bucket": list(batch.bucket),
            "data_wait": data_wait,
            "memory": peak_memory(self.model.device),
            "memory_retries": count_memory_retries(self.model.device),
            "signal": stop.received,
        }

    def _finish(self) -> None:
        """Read the gradient norm of the step taken last, and write its row, unless that has been done."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        (norm,) = taken.norm.get()
        if not math.isfinite(norm):
            self._stop_not_finite("gradient norm", norm, taken.step, taken.batch)
        if self._rows is not None:
            self._rows.write(taken.row | {"grad_norm": norm})

    def _finish_after_error(self) -> None:
        """As `_finish`, but without the other processes, and what fails here is only told: the error has to be seen."""
        taken, self._taken = self._taken, None
        if taken is None or self._rows is None:
            return
        try:
            (norm,) = taken.norm.get(SECONDS_AFTER_ERROR)
            if not math.isfinite(norm):
                raise ValueError(f"its gradient norm is {norm}")
            self._rows.write(taken.row | {"grad_norm": norm})
        except Exception as error:  # whatever it is: the GPU has failed, a process is lost, the disk is full
            self.note(f"warning: {METRICS} lacks the last finished step, {taken.step}: {error}")

    def _stop_not_finite(self, what: str, value: float, step: int, batch: Batch) -> NoReturn:
        # The state is that before the step: step back to its batch.
        self.position = Position(step - 1, batch.epoch, self._first_index(batch))
        batches = find_not_finite(self.processes, value, batch)
        described = describe_batches(batches, self.processes.world_size)
        happened = f"step {step}: the {what} is {batches[0]['value']}"
        try:
            self.save()
            self.finish_saving()
        except Exception as error:  # whatever it is: what is not finite has to be seen
            raise NonFiniteError(f"{happened}. Batch:\n{described}\nand {error}") from error
        if self.processes.rank != 0:
            # Rank 0 says what has happened. Were another the first to end, torchrun could end rank 0 before it does.
            self.processes.gather(None)
        command = self.replay(self.last_checkpoint, step)
        written = write_report(self.folder, {"step": step, "what": what, "batches": batches, "replay": command})
        raise NonFiniteError(
            f"{happened}. The weights are those of step {step - 1} ({self.last_checkpoint}). Batch ({written}):\n"
            f"{described}\nTo run this step again:\n  {command}"
        )
