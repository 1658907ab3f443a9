"""The training loop: batches in, optimizer steps, metrics and checkpoints out.

A step never asks the GPU for a number it has to wait for. The loss is copied to the host while backward is queued, and
read before the optimizer runs, so a loss that is not finite changes nothing. The gradient norm is read one step later:
a step whose gradient is not finite is skipped on the device itself (see `MasterAdamW`), and the average of the weights
follows a step only after its norm is known. Either way the run stops with the weights of the step before.
"""

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_fast.data.loader import Batch
from opensora_fast.model import STDiT2
from opensora_fast.progress import Progress
from opensora_fast.train.checkpoint import write_checkpoint
from opensora_fast.train.ema import EMA
from opensora_fast.train.host_values import HostValues
from opensora_fast.train.metrics import MetricsWriter
from opensora_fast.train.model_inputs import ModelInputs
from opensora_fast.train.optimizer import MasterAdamW
from opensora_fast.train.randomness import seed_step
from opensora_fast.train.stop import StopSignals


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is not finite. Nothing was changed by that step."""


@dataclass
class Position:
    """Where a run stands: steps taken, and the micro-batches of the current epoch that have been used on all ranks."""

    step: int = 0
    epoch: int = 0
    consumed: int = 0


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
    losses: list[float]
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
        masks: MaskGenerator, or None for no masks.
        inputs: turns a batch into latents and conditioning.
        batches: batches(epoch, consumed) yields the batches of one epoch from that position on.
        extra_files: writes further files into a checkpoint folder (configuration, encoders).
        folder: output folder of the run.
        replay: replay(checkpoint, step) is the command that runs the step again.
    """

    model: STDiT2
    optimizer: MasterAdamW
    ema: EMA
    diffusion: Any
    masks: Any
    inputs: ModelInputs
    batches: Callable[[int, int], Iterator[Batch]]
    extra_files: Callable[[Path], None]
    folder: Path
    replay: Callable[[Path, int], str]
    limits: Limits
    seed: int
    state_note: dict[str, Any]
    rank: int = 0
    world_size: int = 1
    position: Position = field(default_factory=Position)
    last_checkpoint: Path | None = None
    _recent: list[float] = field(default_factory=list)

    def run(self) -> int | None:
        """Train to the end. Returns the number of the signal that stopped the run before it, or None.

        Raises:
            NonFiniteError: after a checkpoint of the step before and `nonfinite.json` have been written.
            ValueError: an epoch has no batch.
        """
        first_step = self.position.step
        metrics = MetricsWriter(self.folder / "metrics.jsonl", first_step)
        total = None if self.limits.steps is None else self.limits.steps - first_step
        try:
            with StopSignals() as stop, Progress("train", total=total, unit="steps") as progress:
                self._run_steps(stop, progress, metrics)
                if self.last_checkpoint is None or self.last_checkpoint.name != f"step-{self.position.step:08d}":
                    self.save()
                return stop.received
        finally:
            metrics.close()

    def _run_steps(self, stop: StopSignals, progress: Progress, metrics: MetricsWriter) -> None:
        taken: Taken | None = None
        iterator = self._iterate()
        started = time.perf_counter()
        while not stop.received and not self._is_last():
            batch = next(iterator, None)
            if batch is None:
                break
            data_wait = time.perf_counter() - started
            taken = self._take_step(batch, taken, progress, metrics)
            now = time.perf_counter()
            taken.row |= self._measure(batch, now - started, data_wait)
            started = now
            self.position.consumed = batch.index - self.rank + self.world_size
            self.position.step += 1
            every = self.limits.checkpoint_every
            if every and self.position.step % every == 0:
                taken = self._finish(taken, progress, metrics)
                self.save()
                started = time.perf_counter()
        self._finish(taken, progress, metrics)
        iterator.close()

    def _is_last(self) -> bool:
        return self.limits.steps is not None and self.position.step >= self.limits.steps

    def _iterate(self) -> Iterator[Batch]:
        while self.position.epoch < self.limits.epochs:
            found = self.position.consumed > 0
            for batch in self.batches(self.position.epoch, self.position.consumed):
                found = True
                yield batch
            if not found:
                raise ValueError(f"epoch {self.position.epoch} has no batch: every clip was dropped by bucket_config")
            self.position.epoch += 1
            self.position.consumed = 0

    def _take_step(self, batch: Batch, before: Taken | None, progress: Progress, metrics: MetricsWriter) -> Taken:
        step = self.position.step + 1
        losses = self.compute_losses(batch, step)
        values = HostValues(*losses.values())
        losses["loss"].backward()
        numbers = values.get()
        self._finish(before, progress, metrics)
        row = {"step": step, **dict(zip(losses, numbers, strict=True))}
        if not math.isfinite(numbers[0]):
            self.optimizer.adam.zero_grad(set_to_none=True)
            self._stop_not_finite("loss", numbers[0], step, batch)
        norm = self.optimizer.step()
        return Taken(step, batch, numbers, HostValues(norm), row)

    def compute_losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """`loss` and its parts, each [] on the device, for a batch at a step; draws all randomness of the step."""
        seed_step(self.seed, step, self.rank)
        latents, conditions = self.inputs.prepare(batch)
        mask = None
        if self.masks is not None:
            drawn = torch.stack([self.masks.draw(latents.shape[2]) for _ in range(latents.shape[0])])
            if not drawn.all():  # a batch of noised frames only needs no mask: the model does half the modulation
                mask = conditions["x_mask"] = drawn
        timesteps = torch.randint(0, self.diffusion.num_timesteps, (latents.shape[0],))
        losses = self.diffusion.training_losses(self.model, latents, timesteps, conditions, mask=mask)
        return {"loss": losses["loss"].mean(), **{key: losses[key].mean() for key in ("mse", "vb") if key in losses}}

    def _finish(self, taken: Taken | None, progress: Progress, metrics: MetricsWriter) -> None:
        """Read the gradient norm of a step, let the average follow it and write its row."""
        if taken is None:
            return
        (norm,) = taken.norm.get()
        taken.row["grad_norm"] = norm
        if not math.isfinite(norm):
            self._stop_not_finite("gradient norm", norm, taken.step, taken.batch)
        self.ema.update(self.optimizer.masters)
        metrics.write(taken.row)
        self._recent = [*self._recent, taken.losses[0]][-self.limits.log_every :]
        shown = {
            "step": taken.step,
            "loss": f"{sum(self._recent) / len(self._recent):.4f}",
            "tokens/s": f"{taken.row['tokens_per_s']:.0f}",
            "data wait": f"{100 * taken.row['data_wait'] / taken.row['step_time']:.0f} %",
        }
        progress.advance(1, **shown)

    def _measure(self, batch: Batch, step_time: float, data_wait: float) -> dict[str, Any]:
        tokens = self.inputs.count_tokens(batch, self.model.patch)
        return {
            "lr": self.optimizer.adam.param_groups[0]["lr"],
            "tokens": tokens,
            "tokens_per_s": tokens / step_time,
            "step_time": step_time,
            "data_wait": data_wait,
            "bucket": list(batch.bucket),
            "batch_size": len(batch.rows),
            "epoch": batch.epoch,
            "micro_batch": batch.index,
            "memory": _peak_memory(self.model.device),
        }

    def _stop_not_finite(self, what: str, value: float, step: int, batch: Batch) -> NoReturn:
        # The state is that before the step: step back to its batch.
        self.position = Position(step - 1, batch.epoch, batch.index - self.rank)
        checkpoint = self.save()
        command = self.replay(checkpoint, step)
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
            f"step {step}: the {what} is {value}. The weights are those of step {step - 1} ({checkpoint}). "
            f"Batch: bucket {batch.bucket}, rows {', '.join(map(str, batch.rows))} of the table, micro-batch "
            f"{batch.index} of epoch {batch.epoch} (also in {path}). To run this step again:\n  {command}"
        )

    def save(self) -> Path:
        """Write a checkpoint of the present position; every step taken must have been finished."""
        self.last_checkpoint = write_checkpoint(
            self.folder / "checkpoints", self.position.step, self._fill, self.limits.keep_checkpoints
        )
        return self.last_checkpoint

    def _fill(self, folder: Path) -> None:
        for name, trained in (("model", None), ("ema", self.ema.average)):
            (folder / name).mkdir()
            state = {key: value.cpu().contiguous() for key, value in self.optimizer.full_state(trained).items()}
            save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
            (folder / name / "config.json").write_text(self.model.config.model_dump_json(indent=2) + "\n")
        moments = {key: value.cpu().contiguous() for key, value in self.optimizer.state_dict().items()}
        save_file(moments, folder / "optimizer.safetensors")
        state = {
            "step": self.position.step,
            "sampler": {"seed": self.seed, "epoch": self.position.epoch, "consumed": self.position.consumed},
            "random": {"seed": self.seed, "rule": "every step draws from (seed, step, rank)"},
            "world_size": self.world_size,
            **self.state_note,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        self.extra_files(folder)

    def load_weights(self, checkpoint: Path) -> None:
        """Take weights, average and optimizer state of a verified checkpoint, but not its position."""
        self.optimizer.load_weights(load_file(checkpoint / "model" / "model.safetensors"))
        self.ema.load(load_file(checkpoint / "ema" / "model.safetensors"))
        self.optimizer.load_state_dict(load_file(checkpoint / "optimizer.safetensors"))

    def resume(self, checkpoint: Path) -> None:
        """Go on from a verified checkpoint. ValueError if it belongs to another run's data or seed."""
        state = json.loads((checkpoint / "state.json").read_text())
        for key, value in self.state_note.items():
            if state.get(key) != value:
                raise ValueError(
                    f"{checkpoint} was written with another {key} ({state.get(key)!r}, now {value!r}), so its order of "
                    "batches cannot be continued; to take its weights and optimizer state into a new order, use "
                    f"load={checkpoint} start_from_scratch=True in place of --resume"
                )
        sampler = state["sampler"]
        if sampler["seed"] != self.seed:
            raise ValueError(f"{checkpoint} was written with seed={sampler['seed']}; the seed is now {self.seed}")
        self.load_weights(checkpoint)
        self.position = Position(state["step"], sampler["epoch"], sampler["consumed"])
        self.last_checkpoint = checkpoint if checkpoint.parent == self.folder / "checkpoints" else None


def _peak_memory(device: torch.device) -> int:
    """Bytes: most that torch held on the GPU so far, or the process on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
