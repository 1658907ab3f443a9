"""Runs `opensora-fast` in several processes as torchrun does, but each a fork of this one, which has imported
everything once.

Reads a job a line, in JSON, from standard input: `world_size`, `arguments` of the command, a `function` "module:name"
that is called with them in its place (null: none), the elements of a `segment` of the gradients, and perhaps a `fault`,
which happens in the process `rank` (null: in all) at `step`. Answers with a line: of each rank the exit code (negative:
killed by that signal; null: it had to be ended after `seconds`), the time of its end, standard output and standard
error.
"""

import json
import os
import pkgutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from run_again import RunAgain

import opensora_fast.parallel.processes as processes_module
from opensora_fast import cli
from opensora_fast.encoders import build_text_encoder
from opensora_fast.train import train
from opensora_fast.train.checkpoints import state
from opensora_fast.train.loop import Trainer
from opensora_fast.train.optimizer import gradients
from opensora_fast.train.optimizer.gradients import MeanGradient
from opensora_fast.train.optimizer.master_adamw import MasterAdamW
from opensora_fast.train.step.graphs import StepGraphs


def main() -> None:
    torch.set_num_threads(1)
    build_text_encoder({"type": "bytes"}).encode(["a caption"])  # imports transformers, and ftfy
    cli.list_subcommands()  # reads the file of each
    for line in sys.stdin:
        print(json.dumps(run_job(**json.loads(line))), flush=True)


def run_job(
    world_size: int, arguments: list[str], function: str | None, segment: int, fault: dict | None, seconds: float
) -> list[dict]:
    gradients.SEGMENT = segment
    with tempfile.TemporaryDirectory() as folder:
        port = find_free_port()
        children = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                become_rank(rank, world_size, port, Path(folder), arguments, function, fault)
            children.append(pid)
        ends = wait_for(children, seconds)
        return [
            {
                "code": code,
                "time": end,
                "out": (Path(folder) / f"{rank}.out").read_text(),
                "error": (Path(folder) / f"{rank}.err").read_text(),
            }
            for rank, (code, end) in enumerate(ends)
        ]


def become_rank(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    arguments: list[str],
    function: str | None,
    fault: dict | None,
) -> None:
    code = 70
    try:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if fault is not None and fault["rank"] in (rank, None):
            FAULTS[fault["kind"]](fault["step"])
        code = cli.run(arguments) if function is None else pkgutil.resolve_name(function)(*arguments)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(children: list[int], seconds: float) -> list[tuple[int | None, float]]:
    """Exit codes and when each ended; whoever is still there after that time is killed and has no code."""
    ends = {}
    deadline = time.monotonic() + seconds
    while len(ends) < len(children) and time.monotonic() < deadline:
        for pid in set(children) - set(ends):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[pid] = os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.01)
    for pid in set(children) - set(ends):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [ends.get(pid, (None, deadline)) for pid in children]


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def at_step(happen):
    """A fault: `happen(trainer, losses)` returns the losses of that step, or does something else."""

    def install(step: int) -> None:
        real = Trainer.compute_losses

        def faulty(self, batch, number):
            losses = real(self, batch, number)
            return happen(self, losses) if number == step else losses

        Trainer.compute_losses = faulty

    return install


def nan_loss(trainer, losses):
    return losses | {"loss": losses["loss"] * float("nan")}


def nan_gradient(trainer, losses):
    # 0 * sqrt'(0) has the value 0 and the gradient nan
    return losses | {"loss": losses["loss"] + torch.sqrt((trainer.model.final_layer.linear.bias.sum() * 0).abs()) * 0}


def sigterm(trainer, losses):
    os.kill(os.getpid(), signal.SIGTERM)
    return losses


def kill(trainer, losses):
    trainer.finish_saving()  # the checkpoint of the step before
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("tried to allocate more than there is")


def in_backward(happen):
    """At the end of backward, when only the gradient of the patches' weight is still missing."""

    def install(trainer, losses):
        trainer.model.x_embedder.proj.weight.register_hook(lambda gradient: happen(trainer, losses) and None)
        return losses

    return install


def replay(_: int) -> None:
    """Every step is a replayed one, whose backward calls no hooks."""

    def make_graphs(config, model, diffusion):
        compute = partial(train.compute_losses, model, diffusion)
        return StepGraphs(model, compute, 10**6, occurrences=1, record=RunAgain())

    train.make_graphs = make_graphs


def replay_and_lose(step: int) -> None:
    replay(step)
    at_step(nan_loss)(step)


def tell_order(step: int) -> None:
    """Print, in their order and with the time, batches and gradients that are there, reduce-scatters that begin, and
    `backward` after each. The batch of that step comes a second late to rank 1."""
    iterate, arrive, begin = Trainer._iterate, MeanGradient._arrive, MasterAdamW.begin_step
    reduce_scatter = processes_module.reduce_scatter

    def tell(*words):
        print("told", *words, time.monotonic())

    def tell_batches(self):
        for number, batch in enumerate(iterate(self), start=1):
            if self.processes.rank == 1 and number == step:
                time.sleep(1)
            tell("batch", number)
            yield batch

    def tell_gradient(self, number, name, parameter):
        tell("gradient", name)
        arrive(self, number, name, parameter)

    def tell_segment(output, tensor):
        tell("reduce-scatter", len(tensor))
        return reduce_scatter(output, tensor)

    def tell_backward(self):
        tell("backward", "")
        begin(self)

    Trainer._iterate, MeanGradient._arrive, MasterAdamW.begin_step = tell_batches, tell_gradient, tell_backward
    processes_module.reduce_scatter = tell_segment


def kill_while_giving_a_shard(step: int) -> None:
    """`kill -9` of a process that has given the checkpoint of that step its weights, but not yet the average."""
    collected = 0
    real = MasterAdamW.collect

    def count(self, flat):
        nonlocal collected
        collected += 1
        if collected == 4 * (step - 1) + 2:  # four of them a checkpoint: weights, average, two moments
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, flat)

    MasterAdamW.collect = count


def kill_while_writing(step: int) -> None:
    """`kill -9` of rank 0 when the checkpoint of that step has been written, but does not have its name yet."""
    real = os.rename

    def rename(source, target):
        if str(target).endswith(f"step-{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.rename = rename


def lose_memory_while_the_disk_is_full(step: int) -> None:
    """Rank 0 cannot write the average into the checkpoint of the step before; then the others have no memory left."""
    real = state.save_pretrained

    def save_pretrained(config, tensors, folder):
        if folder.name == "ema" and folder.parent.name.endswith(f"step-{step - 1:08d}"):
            raise OSError("no space left on device")
        real(config, tensors, folder)

    state.save_pretrained = save_pretrained
    if os.environ["RANK"] != "0":
        at_step(out_of_memory)(step)


def report_slowly(step: int) -> None:
    """Rank 0 takes two seconds for what it writes and prints in the end."""
    real = train.report_kernels

    def slow(*arguments):
        time.sleep(2)
        real(*arguments)

    train.report_kernels = slow


FAULTS = {
    "report slowly": report_slowly,
    "nan loss": at_step(nan_loss),
    "nan gradient": at_step(nan_gradient),
    "sigterm": at_step(sigterm),
    "kill": at_step(kill),
    "kill while saving": at_step(kill_while_saving),
    "kill in backward": at_step(in_backward(kill)),
    "out of memory": at_step(out_of_memory),
    "out of memory in backward": at_step(in_backward(out_of_memory)),
    "replay": replay,
    "replay, nan loss": replay_and_lose,
    "tell order": tell_order,
    "kill while giving a shard": kill_while_giving_a_shard,
    "kill while writing": kill_while_writing,
    "out of memory while the disk is full": lose_memory_while_the_disk_is_full,
}

if __name__ == "__main__":
    main()
