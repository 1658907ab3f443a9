"""A trace of some training steps, for Perfetto: what the host did and when, and what the GPU."""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from opensora_fast.parallel.processes import Processes

# A step is some ten thousand events, and a viewer is to open them all.
MOST_STEPS = 100


class StepTrace:
    """Records training steps with torch's profiler, each process its own, in `DIR/traces/`. Leaving the block, after
    the last step of the run, ends a trace that still goes on.

    Args:
        steps: the first and the last one.
        out: output folder of the run.
        processes: of the run; on a GPU its work is recorded, too.
        report: is given lines for a person.
    """

    def __init__(self, steps: tuple[int, int], out: Path, processes: Processes, report: Callable[[str], None]) -> None:
        self.first, self.last = steps
        self.folder = out / "traces"
        self.processes = processes
        self._report = report
        self._profile: profile | None = None
        self._begun: int | None = None
        self._reached: int | None = None

    def reach(self, step: int) -> None:
        """A step is about to begin: begin the trace, or end it. No range may be open."""
        if self._profile is not None and step > self.last:
            self._end()
        if self._begun is None and self.first <= step <= self.last:
            self._begin(step)
        self._reached = step

    def miss(self) -> None:
        """The step that was reached does not come, for there is no batch."""
        if self._begun == self._reached:
            self._begun = None
        else:
            self._reached -= 1

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._begun is not None:
            if self._profile is not None:
                self._end()
            return
        if self._profile is not None:
            self._profile.stop()
        if self.processes.rank == 0:
            self._report(f"note: no step was traced: the run has taken none of {_describe(self.first, self.last)}")

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self.processes.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.processes.device)  # else the kernels of the step before would be in it
        self._profile, self._begun = profile(activities=activities), step
        self._profile.start()

    def _end(self) -> None:
        ended, self._profile = self._profile, None
        ended.stop()
        steps = f"{self._begun}" if self._begun == self._reached else f"{self._begun}-{self._reached}"
        rank = "" if self.processes.world_size == 1 else f"-rank-{self.processes.rank}"
        path = self.folder / f"steps-{steps}{rank}.json.gz"
        part = path.with_name(f".{path.name}.part.json.gz")
        try:
            self.folder.mkdir(exist_ok=True)
            ended.export_chrome_trace(str(part))
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                part.unlink()  # else what was written of it would go on to fill a full disk
            self._report(f"warning: the trace {path} could not be written: {error}")
            return
        if self.processes.rank == 0:
            each = "" if self.processes.world_size == 1 else ", and one of each other process"
            self._report(f"trace: {path}{each}; open it at https://ui.perfetto.dev")


def parse_trace_steps(text: str) -> tuple[int, int]:
    """`10:13`, or `10` for one, as (first, last). ValueError for anything else, and for more than 100 steps."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"--trace-steps {text}: write the first and the last step, from 1 on, such as 10:13, or one step"
        )
    if last - first >= MOST_STEPS:
        raise ValueError(
            f"--trace-steps {text}: a trace of {last - first + 1} steps cannot be looked at; take at most {MOST_STEPS}"
        )
    return first, last


def refuse_trace_after_end(trace_steps: tuple[int, int] | None, steps: int | None) -> None:
    """ValueError where the run ends, after so many steps in all, before the first one that is to be traced."""
    if trace_steps is not None and steps is not None and trace_steps[0] > steps:
        raise ValueError(
            f"--trace-steps: {_describe(*trace_steps)} would be traced, but the run ends with step {steps} (--steps, "
            "or `steps` of the configuration)"
        )


def _describe(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"
