"""What a checkpoint of a run holds, and how a run takes it up again."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_fast.model.weights import WEIGHTS_NAME, save_pretrained
from opensora_fast.train.checkpoints.checkpoint import locate_step
from opensora_fast.train.optimizer.master_adamw import MasterAdamW

if TYPE_CHECKING:
    from opensora_fast.train.loop import Trainer

FORMAT = 2
State = tuple[str, dict[str, Tensor]]


@dataclass
class Position:
    """Where a run stands: steps taken, and the micro-batches of the current epoch that have been used on all ranks."""

    step: int = 0
    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one step, in the memory of the host, so that it can be written while training goes on.

    Attributes:
        shards: what this process holds of weights, average (`ema`) and optimizer.
        position: of sampler and random numbers, as JSON has it.
    """

    shards: dict[str, Tensor]
    position: dict[str, Any]


def take_snapshot(trainer: "Trainer", buffers: dict[str, Tensor]) -> Snapshot:
    """Copy the state of a run to the host. Every step taken must have been finished.

    Args:
        trainer: the run.
        buffers: where to; filled the first time, and then used again, so that the snapshot before is lost.
    """
    held = trainer.optimizer.shards | {"ema": trainer.ema.flat}
    on_gpu = trainer.model.device.type == "cuda"
    for name, shard in held.items():
        if name not in buffers:
            buffers[name] = torch.empty_like(shard, device="cpu", pin_memory=on_gpu)
        buffers[name].copy_(shard, non_blocking=True)
    if on_gpu:
        torch.cuda.current_stream(trainer.model.device).synchronize()
    position = trainer.position
    return Snapshot(
        dict(buffers),
        {
            "format": FORMAT,
            "step": position.step,
            "sampler": {"seed": trainer.seed, "epoch": position.epoch, "consumed": position.consumed},
            "random": {"seed": trainer.seed, "rule": "every step draws from (seed, step, its micro-batch's number)"},
            "world_size": trainer.processes.world_size,
            "data": trainer.data_fingerprint,
        },
    )


def collect_state(optimizer: MasterAdamW, snapshot: Snapshot) -> Iterator[Callable[[], State]]:
    """What gives the tensors of a checkpoint, of `model`, of `ema`, and of `optimizer`: by name, whole on rank 0.

    What is written does not depend on the number of processes. Each must call all of them, in this order: the others
    wait until rank 0 has taken their shards.
    """

    def collect(name: str, shard: str) -> State:
        return name, optimizer.full_state(optimizer.collect(snapshot.shards[shard]))

    yield partial(collect, "model", "master")
    yield partial(collect, "ema", "ema")
    yield lambda: ("optimizer", optimizer.state_dict(snapshot.shards))


def write_state(trainer: "Trainer", snapshot: Snapshot, collected: Iterable[Callable[[], State]], folder: Path) -> None:
    """Fill a checkpoint folder: `model/` and `ema/` in float32 as `STDiT2.from_pretrained` reads them, the optimizer,
    and the position of sampler and random numbers.

    Args:
        trainer: the run.
        snapshot: of it.
        collected: what `collect_state` gives of the snapshot.
        folder: to be filled, by rank 0.
    """
    for collect in collected:
        name, state = collect()
        if name == "optimizer":
            save_file(state, folder / "optimizer.safetensors")
        else:
            save_pretrained(trainer.model.config, state, folder / name)
        del state  # on the host of rank 0, beside what is collected next
    (folder / "state.json").write_text(json.dumps(snapshot.position, indent=2) + "\n")


def load_weights(trainer: "Trainer", checkpoint: Path) -> None:
    """Take weights, average and optimizer state of a verified checkpoint, but not its position."""
    trainer.optimizer.load_weights(load_file(checkpoint / "model" / WEIGHTS_NAME))
    trainer.ema.load(load_file(checkpoint / "ema" / WEIGHTS_NAME))
    trainer.optimizer.load_state_dict(load_file(checkpoint / "optimizer.safetensors"))


def read_position(checkpoint: Path) -> dict[str, Any]:
    """`state.json`, see `Snapshot`; ValueError if it is of another format."""
    state = json.loads((checkpoint / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has format {state.get('format')}; this version reads {FORMAT}")
    return state


def other_order(checkpoint: Path, written_with: str) -> ValueError:
    """What to raise where something else decides the order of batches than when a checkpoint was written."""
    return ValueError(
        f"{checkpoint} was written with {written_with}, so its order of batches cannot be continued; to take its "
        f"weights and optimizer state into a new order, use load={checkpoint} start_from_scratch=True in place of "
        "--resume, and an --out that holds no run"
    )


def refuse_other_data(checkpoint: Path, position: dict[str, Any], data_fingerprint: str) -> None:
    """ValueError if a checkpoint, of this `read_position`, was written with other data."""
    if position["data"] != data_fingerprint:
        raise other_order(checkpoint, "another table of clips, bucket_config, frame_interval, drop_last or balance")


def resume(trainer: "Trainer", checkpoint: Path) -> None:
    """Go on from a verified checkpoint, of a run with this seed. ValueError if it was written with other data."""
    position = read_position(checkpoint)
    refuse_other_data(checkpoint, position, trainer.data_fingerprint)
    load_weights(trainer, checkpoint)
    sampler = position["sampler"]
    trainer.position = Position(position["step"], sampler["epoch"], sampler["consumed"])
    own = locate_step(trainer.folder / "checkpoints", position["step"])
    trainer.last_checkpoint = own if checkpoint.resolve() == own.resolve() else None
