"""The training loop: batches in, optimizer steps, metrics and checkpoints out.

A step never asks the GPU for a number it has to wait for. The loss is copied to the host while backward is queued, and
read before the optimizer runs, so a loss that is not finite changes nothing. The gradient norm is read one step later:
a step whose gradient is not finite is skipped on the device itself (see `MasterAdamW`). Either way the run stops with
the weights of the step before.
"""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from opensora_fast.data.batch import Batch
from opensora_fast.data.explain import count_tokens
from opensora_fast.diffusion import IDDPM, MaskGenerator
from opensora_fast.model import STDiT2
from opensora_fast.progress import Progress
from opensora_fast.train.checkpoint import get_step, write_checkpoint
from opensora_fast.train.ema import EMA
from opensora_fast.train.host_values import HostValues
from opensora_fast.train.metrics import MetricsWriter
from opensora_fast.train.model_inputs import ModelInputs
from opensora_fast.train.optimizer import MasterAdamW
from opensora_fast.train.randomness import seed_step
from opensora_fast.train.state import Position, write_state
from opensora_fast.train.stop import StopSignals

# With keep probabilities below 1 every clip of a tiny table may lose its draw; that many times in a row is a mistake.
EMPTY_EPOCHS = 100


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is not finite. Nothing was changed by that step."""


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
    """Everything a run needs, and the loop over it.

    Args:
        model: in train mode, on its device, in its working dtype.
        optimizer: owns the weights.
        ema: average of the weights.
        diffusion: IDDPM or SpeeDiffusion.
        masks: None for no masks.
        inputs: turns a batch into latents and conditioning.
        batches: batches(epoch, consumed) yields the batches of one epoch from that position on.
        extra_files: writes further files into a checkpoint folder (configuration, encoders).
        folder: output folder of the run.
        replay: replay(checkpoint, step) is the command that runs the step again.
        limits: when to stop, log and save.
        seed: of the run.
        data_fingerprint: says whether a checkpoint's order of batches is that of this run.
        rank, world_size: of this process.
    """

    model: STDiT2
    optimizer: MasterAdamW
    ema: EMA
    diffusion: IDDPM
    masks: MaskGenerator | None
    inputs: ModelInputs
    batches: Callable[[int, int], Iterator[Batch]]
    extra_files: Callable[[Path], None]
    folder: Path
    replay: Callable[[Path, int], str]
    limits: Limits
    seed: int
    data_fingerprint: str
    rank: int = 0
    world_size: int = 1
    position: Position = field(default_factory=Position)
    last_checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self._progress: Progress | None = None
        self._metrics: MetricsWriter | None = None
        self._recent_losses: list[float] = []

    def run(self) -> int | None:
        """Train to the end. Returns the number of the signal that stopped the run before it, or None.

        Raises:
            NonFiniteError: after a checkpoint of the step before and `nonfinite.json` have been written.
            ValueError: there are no batches, or a batch does not fit into memory.
        """
        first = self.position.step
        total = None if self.limits.steps is None else max(0, self.limits.steps - first)
        self._metrics = MetricsWriter(self.folder / "metrics.jsonl", last_step=first)
        try:
            with StopSignals() as stop, Progress("train", total=total, unit="steps") as self._progress:
                with contextlib.closing(self._iterate()) as batches:
                    self._take_steps(batches, stop)
                self.save()
                return stop.received
        finally:
            self._progress = None
            self._metrics.close()

    def note(self, text: str) -> None:
        """Tell a person one line, without disturbing the progress bar."""
        if self._progress is not None:
            self._progress.note(text)
        else:
            print(text, file=sys.stderr)

    def save(self) -> None:
        """Write a checkpoint of the present position, unless the last one is of it; every step taken must have been
        finished."""
        if self.last_checkpoint is not None and get_step(self.last_checkpoint) == self.position.step:
            return

        def fill(folder: Path) -> None:
            write_state(self, folder)
            self.extra_files(folder)

        self.last_checkpoint = write_checkpoint(
            self.folder / "checkpoints", self.position.step, fill, self.limits.keep_checkpoints
        )

    def compute_losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """`loss` and its parts, each [] on the device, for a batch at a step; draws all randomness of the step."""
        seed_step(self.seed, step, self.rank)
        latents, conditions = self.inputs.prepare(batch)
        videos, _, frames = latents.shape[:3]
        mask = None
        if self.masks is not None:
            drawn = torch.stack([self.masks.draw(frames) for _ in range(videos)])
            if not drawn.all():  # a batch of noised frames only needs no mask: the model does half the modulation
                mask = conditions["x_mask"] = drawn
        timesteps = torch.randint(0, self.diffusion.num_timesteps, (videos,))
        losses = self.diffusion.training_losses(self.model, latents, timesteps, conditions, mask=mask)
        return {"loss": losses["loss"].mean(), **{key: losses[key].mean() for key in ("mse", "vb") if key in losses}}

    def _take_steps(self, batches: Iterator[Batch], stop: StopSignals) -> None:
        taken: Taken | None = None
        started = time.perf_counter()
        while not stop.received and (self.limits.steps is None or self.position.step < self.limits.steps):
            batch = next(batches, None)
            if batch is None:
                break
            data_wait = time.perf_counter() - started
            taken = self._take_step(batch, taken)
            now = time.perf_counter()
            taken.row |= self._measure(batch, now - started, data_wait)
            started = now
            self.position.step += 1
            self.position.consumed = batch.index - self.rank + self.world_size
            if self.limits.checkpoint_every and self.position.step % self.limits.checkpoint_every == 0:
                self._finish(taken)
                taken = None
                self.save()
                started = time.perf_counter()
        self._finish(taken)

    def _iterate(self) -> Iterator[Batch]:
        empty_epochs = 0
        while self.position.epoch < self.limits.epochs:
            empty_epochs += self.position.consumed == 0
            for batch in self.batches(self.position.epoch, self.position.consumed):
                empty_epochs = 0
                yield batch
            if empty_epochs == EMPTY_EPOCHS:
                raise ValueError(f"{EMPTY_EPOCHS} epochs in a row have no batch: raise the keep probabilities")
            self.position.epoch += 1
            self.position.consumed = 0

    def _take_step(self, batch: Batch, before: Taken | None) -> Taken:
        step = self.position.step + 1
        try:
            losses = self.compute_losses(batch, step)
            values = HostValues(*losses.values())
            losses["loss"].backward()
        except torch.OutOfMemoryError as error:
            raise ValueError(_describe_out_of_memory(batch, step, error)) from error
        numbers = values.get()
        self._finish(before)
        if not math.isfinite(numbers[0]):
            self._stop_not_finite("loss", numbers[0], step, batch)
        row = {"step": step, **dict(zip(losses, numbers, strict=True))}
        return Taken(step, batch, HostValues(self.optimizer.step(self.ema)), row)

    def _finish(self, taken: Taken | None) -> None:
        """Read the gradient norm of a step and write its row."""
        if taken is None:
            return
        (norm,) = taken.norm.get()
        if not math.isfinite(norm):
            self._stop_not_finite("gradient norm", norm, taken.step, taken.batch)
        row = taken.row | {"grad_norm": norm}
        self._metrics.write(row)
        self._recent_losses = [*self._recent_losses, row["loss"]][-self.limits.log_every :]
        shown = {
            "loss": f"{sum(self._recent_losses) / len(self._recent_losses):.4f}",
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "data wait": f"{100 * row['data_wait'] / row['step_time']:.0f} %",
        }
        self._progress.advance(1, **shown)

    def _measure(self, batch: Batch, step_time: float, data_wait: float) -> dict[str, Any]:
        size = (int(values[0]) for values in (batch.num_frames, batch.height, batch.width))
        tokens = len(batch) * count_tokens(*size)
        return {
            "lr": self.optimizer.lr,
            "tokens": tokens,
            "tokens_per_s": tokens / step_time,
            "step_time": step_time,
            "data_wait": data_wait,
            "bucket": list(batch.bucket),
            "batch_size": len(batch),
            "epoch": batch.epoch,
            "micro_batch": batch.index,
            "memory": _peak_memory(self.model.device),
        }

    def _stop_not_finite(self, what: str, value: float, step: int, batch: Batch) -> NoReturn:
        # The state is that before the step: step back to its batch.
        self.position = Position(step - 1, batch.epoch, batch.index - self.rank)
        self.save()
        command = self.replay(self.last_checkpoint, step)
        report = {
            "step": step,
            "what": what,
            "value": str(value),
            "bucket": list(batch.bucket),
            "rows": list(batch.rows),
            "texts": list(batch.text),
            "epoch": batch.epoch,
            "micro_batch": batch.index,
            "replay": command,
        }
        path = self.folder / "nonfinite.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        raise NonFiniteError(
            f"step {step}: the {what} is {value}. The weights are those of step {step - 1} ({self.last_checkpoint}). "
            f"Batch: bucket {batch.bucket}, rows {', '.join(map(str, batch.rows))} of the table, micro-batch "
            f"{batch.index} of epoch {batch.epoch} (also in {path}). To run this step again:\n  {command}"
        )


def _describe_out_of_memory(batch: Batch, step: int, error: BaseException) -> str:
    resolution, frames, _ = batch.bucket
    return (
        f"step {step}: out of GPU memory with {len(batch)} clips of bucket {batch.bucket}: lower the batch size of "
        f"bucket_config[{resolution!r}][{frames}], or recompute activations with grad_checkpoint=True. {error}"
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes: most that torch held on the GPU so far, or the process on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
