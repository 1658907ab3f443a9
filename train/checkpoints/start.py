"""Where a run begins: afresh, with other weights, or with a checkpoint to continue."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from opensora_fast.config import TrainConfig, list_values, load_train_config
from opensora_fast.data.feature_store import INDEX_NAME
from opensora_fast.model import STDiT2
from opensora_fast.model.checkpoint_files import find_checkpoint_file, locate_checkpoint_file
from opensora_fast.model.pixart import initialize_from
from opensora_fast.model.weights import load_strictly, read_config
from opensora_fast.parallel.processes import Processes
from opensora_fast.train.checkpoints.checkpoint import (
    COMPLETE,
    find_newest,
    get_step,
    list_checkpoints,
    locate_checkpoint,
    read_step,
    set_aside_newer,
)
from opensora_fast.train.checkpoints.state import other_order, read_position, refuse_other_data
from opensora_fast.train.inputs.data import TrainingData
from opensora_fast.train.inputs.encoders import FITTED, holds_other_fitted
from opensora_fast.train.monitoring.metrics import METRICS, read_metrics

CHECKPOINT_CONFIG = "train_config.json"


@dataclass(frozen=True)
class Start:
    """Where a run begins: with a checkpoint to continue, or with other weights (and optimizer state), or afresh."""

    resume: Path | None = None
    state: Path | None = None
    weights: str | None = None

    @property
    def origin(self) -> Path | None:
        """The checkpoint, also where its `ema` or the file in it was named, or whatever holds the weights."""
        if self.weights is None:
            return self.resume or self.state
        return find_whole(Path(self.weights))


def refuse_other_place(out: Path) -> None:
    """ValueError where the folder of a run would be a file, lie below one, or be a checkpoint: even the lock is a file
    too many there."""
    nearest = next(place for place in (out, *out.parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {out}: {nearest} is a file: give a folder")
    if (out / COMPLETE).exists():
        raise ValueError(f"{out} is a checkpoint, in which a run would spoil it: give another --out")


def agree_on_start(
    processes: Processes,
    config: TrainConfig,
    out: Path,
    resume: str | None,
    init_from: str | None,
    report: Callable[[str], None],
) -> Start:
    """The same decision on every process: rank 0 makes it, see `choose_start`, puts damaged checkpoints aside and
    downloads weights."""
    chosen = None
    if processes.rank == 0:
        start = choose_start(config, out, resume, init_from, report)
        if resume == "auto" and start.resume is not None:
            for folder in set_aside_newer(start.resume):
                report(f"note: the damaged checkpoint is now called {folder}")
        if start.weights is not None:
            locate_checkpoint_file(start.weights, _name_weights(init_from))
        chosen = {"resume": start.resume and str(start.resume), "state": start.state and str(start.state)}
        chosen["weights"] = start.weights
    chosen = processes.gather(chosen)[0]
    resume_from, state, weights = chosen["resume"], chosen["state"], chosen["weights"]
    return Start(resume_from and Path(resume_from), state and Path(state), weights)


def choose_start(
    config: TrainConfig, out: Path, resume: str | None, init_from: str | None, report: Callable[[str], None]
) -> Start:
    """Decide where a run begins, and refuse to write over another one. Nothing is written or downloaded.

    Raises:
        ValueError: `out` holds a run that is not to be continued, options contradict each other, or what they name is
            not there.
    """
    checkpoints = out / "checkpoints"
    if resume == "":  # would be the current folder, and is more likely a shell variable that is not set
        raise ValueError('--resume "": name a checkpoint or a run, or write auto for the newest checkpoint of --out')
    if resume is not None and resume != "auto":
        if init_from is not None:
            raise ValueError("--resume PATH continues a run, --init-from starts a new one: give one of them")
        checkpoint = locate_checkpoint(Path(resume), report)
        step = read_step(checkpoint)
        later = [path for path in list_checkpoints(checkpoints) if get_step(path) > step]
        if later:
            raise ValueError(
                f"{out} holds later checkpoints than {checkpoint} ({later[0].name}); remove them, or give another --out"
            )
        refuse_rows_of_another(out, checkpoint)
        note_unread(checkpoint, config, None, report)
        return Start(resume=checkpoint)
    if resume == "auto":
        newest = find_newest(checkpoints, report)
        if newest is not None:
            note_unread(newest, config, init_from, report)
            return Start(resume=newest)
        if list_checkpoints(checkpoints):
            raise ValueError(f"{checkpoints} holds no checkpoint that is whole; remove them to start anew")
    elif (out / METRICS).exists() or list_checkpoints(checkpoints):
        raise ValueError(f"{out} holds a run already: add --resume auto to continue it, or give another --out")
    if config.load is not None:
        if init_from is not None:
            raise ValueError("--init-from and `load` of the configuration both name weights to start from: give one")
        checkpoint = locate_checkpoint(Path(config.load), report)
        if config.start_from_scratch:
            return Start(state=checkpoint)
        refuse_rows_of_another(out, checkpoint)
        return Start(resume=checkpoint)
    source = config.model.from_pretrained if init_from is None else init_from
    if (checkpoint := find_checkpoint(source, report)) is not None:
        return Start(weights=str(checkpoint))
    if source is not None:
        find_checkpoint_file(source, _name_weights(init_from))
    return Start(weights=source)


def _name_weights(init_from: str | None) -> str:
    """What names the weights to start from, for messages."""
    return "model.from_pretrained" if init_from is None else "--init-from"


def note_unread(checkpoint: Path, config: TrainConfig, init_from: str | None, report: Callable[[str], None]) -> None:
    """Say what of the command that began a run is not read where a checkpoint is continued."""
    for name, value in (("--init-from ", init_from), ("load=", config.load)):
        if value is not None:
            report(f"note: the run continues from {checkpoint}; {name}{value} was not read")


def refuse_rows_of_another(out: Path, checkpoint: Path) -> None:
    """ValueError where a checkpoint from elsewhere would be continued behind rows of the run that is in `out`: rows up
    to its step stay (see `MetricsWriter`)."""
    if checkpoint.resolve().parent == (out / "checkpoints").resolve() or not (out / METRICS).exists():
        return
    step = read_step(checkpoint)
    if any(row["step"] <= step for row in read_metrics(out / METRICS)):
        raise ValueError(
            f"{out} holds a run of its own, and {out / METRICS} would join its rows up to step {step} to those behind "
            f"{checkpoint}: give another --out, or move a checkpoint of that run into {out / 'checkpoints'}"
        )


def find_checkpoint(source: str | None, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that is meant where `source` is a run or checkpoint of this trainer, else None."""
    if not source:
        return None
    path = Path(source)
    is_own = (path / "checkpoints").is_dir() or (path / COMPLETE).is_file() or list_checkpoints(path)
    return locate_checkpoint(path, report) if is_own else None


def find_whole(part: Path) -> Path:
    """The checkpoint of this trainer where a model's folder or file in it was named, otherwise what was named."""
    return next((folder for folder in part.parents[:2] if (folder / COMPLETE).is_file()), part)


def load_initial_weights(model: STDiT2, source: str, report: Callable[[str], None]) -> None:
    """Start from other weights, and report what was and was not loaded.

    Those of a checkpoint of this trainer (not averaged; give its `ema` folder for the average) must fit entirely.
    Others, such as PixArt-alpha's, may lack parts; see `initialize_from`.
    """
    if not (Path(source) / COMPLETE).is_file():
        initialize_from(model, source, report)
        return
    state = load_file(Path(source) / "model" / "model.safetensors")
    try:
        load_strictly(model, state, source)
    except ValueError as error:
        saved, own = read_config(Path(source) / "model").model_dump(), model.config.model_dump()
        different = [f"{key}={saved[key]!r}, here {own[key]!r}" for key in own if saved[key] != own[key]]
        if not different:
            raise
        raise ValueError(f"{error}. They were trained with {'; '.join(different)}") from error
    report(f"weights: all {len(state)} tensors of {source}")


def find_fitted(start: Start, out: Path) -> Path | None:
    """The run or checkpoint whose fitted autoencoder a run in `out` takes; it may hold none, and then one is fitted.

    Raises:
        ValueError: `out` has another than the run starts from.
    """
    # Cached features that lie in `out` need theirs; what else a run without a step has left is not used.
    if start.resume is None and not (out / INDEX_NAME).exists():
        return start.origin
    if start.origin is not None and holds_other_fitted(start.origin, out):
        raise ValueError(
            f"{out / FITTED} is not the linear autoencoder that {start.origin} was trained with: remove it, or give "
            "another --out"
        )
    return out if (out / FITTED).is_dir() else start.origin


def check_changes(
    checkpoint: Path,
    config: TrainConfig,
    data: TrainingData,
    world_size: int,
    replicas: int,
    report: Callable[[str], None],
) -> None:
    """Say which values, and whether the number of processes, differ from those that the checkpoint was trained with.

    Args:
        checkpoint: is continued.
        config, data: of the run.
        world_size, replicas: see `Processes`.
        report: is told of each difference.

    Raises:
        ValueError: its order of batches cannot go on, as far as that is known before features are opened.
    """
    before = load_train_config(checkpoint / CHECKPOINT_CONFIG).config
    position = read_position(checkpoint)
    world_size_before = position["world_size"]
    replicas_before = world_size_before // before.sp_size
    if world_size != world_size_before:
        report(
            f"note: the number of processes is now {world_size}, the checkpoint was trained with {world_size_before}"
        )
    if replicas != replicas_before:
        report(
            f"note: a step takes {replicas} micro-batch{'es' * (replicas != 1)} in place of {replicas_before}: their "
            "order goes on, and for each of them random numbers are drawn"
        )
    values_before = dict(list_values(before))
    for key, value in list_values(config):
        if key not in values_before or key in ("steps", "load", "dataset.data_path", "features"):
            continue
        if value != values_before[key]:
            report(f"note: {key} is now {value!r}, the checkpoint was trained with {values_before[key]!r}")
    if (seed := position["sampler"]["seed"]) != config.seed:
        raise other_order(checkpoint, f"seed={seed}, and it is now {config.seed}")
    if (config.features is None) != (before.features is None):
        raise other_order(checkpoint, "clips, not features" if before.features is None else "features, not clips")
    if config.features is None:
        refuse_other_data(checkpoint, position, data.get_fingerprint())
