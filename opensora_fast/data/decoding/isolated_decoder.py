"""A decoder in a process of its own: a crash or a hang inside a library costs one clip, not the run.

DALI on the CPU gets one: among some thousand damaged clips there was one that crashed it. The clips come back through a
pipe, which costs about a millisecond for each MiB. The first process of a run takes some seconds to start, one after a
crash less than a second.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from opensora_fast.data.decoding.clips import BadClip, ClipRequest, Decoder

START_LIMIT = 120.0


class IsolatedDecoder:
    """Runs another decoder in a child process.

    Args:
        make_decoder: makes the decoder; called in the child, so it must be picklable: a class or function of a module,
            or a `functools.partial` of one. Clips must be on the CPU.
        time_limit: seconds for one clip. A call that takes longer, for all its clips together, is ended by force, and
            its clips are tried one by one. It should be above that of the decoder inside, which knows more about what
            is slow.
        threads: those of the decoder inside.

    Attributes:
        restarts: how many times a child process was lost.
    """

    def __init__(self, make_decoder: Callable[[], Decoder], time_limit: float, threads: int = 1) -> None:
        if time_limit <= 0:
            raise ValueError(f"time_limit must be above 0 seconds, got {time_limit}")
        self.time_limit = time_limit
        self.threads = threads
        self.restarts = 0
        self._make_decoder = make_decoder
        self._lethal: dict[str, str] = {}
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def decode(self, requests: Sequence[ClipRequest]) -> list[torch.Tensor | BadClip]:
        """See `clips.Decoder`. Errors of the decoder that are not about a clip are raised here."""
        results: list[torch.Tensor | BadClip | None] = [
            BadClip(request.row, request.path, self._lethal[request.path]) if request.path in self._lethal else None
            for request in requests
        ]
        places = [place for place, result in enumerate(results) if result is None]
        decoded = self._decode_together([requests[place] for place in places]) if places else []
        if isinstance(decoded, str):
            decoded = [self._decode_alone(requests[place]) for place in places]
        for place, result in zip(places, decoded, strict=True):
            results[place] = result
        return results

    def _decode_alone(self, request: ClipRequest) -> torch.Tensor | BadClip:
        decoded = self._decode_together([request])
        if isinstance(decoded, str):
            self._lethal[request.path] = decoded  # not again: each time costs a process
            return BadClip(request.row, request.path, decoded)
        return decoded[0]

    def _decode_together(self, requests: list[ClipRequest]) -> list[torch.Tensor | BadClip] | str:
        """The answers, or what became of the process."""
        if self._process is None:
            self._start()
        try:
            self._connection.send(requests)
            return self._receive(self.time_limit * len(requests))
        except (EOFError, OSError):
            return self._lose_process()

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            self._connection.close()
            self._process.join(timeout=5)
            self._lose_process()
            self.restarts -= 1

    def _start(self) -> None:
        # A forked copy of this process, which has threads and may have used CUDA, could hang. The fork server is a
        # bare process that has only imported these modules, so that a further child starts in no time.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, child_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child_end, self._make_decoder), name="decode clips", daemon=True
        )
        self._process.start()
        child_end.close()
        if not self._connection.poll(START_LIMIT):
            self._lose_process()
            raise RuntimeError(f"the decoding process did not start within {START_LIMIT:g} s")
        try:
            error = self._connection.recv()
        except EOFError:
            raise RuntimeError(
                f"the decoding process ended while it started: {self._lose_process()}. A script that makes decoders "
                'must do so under `if __name__ == "__main__":`'
            ) from None
        if error is not None:
            self._lose_process()
            raise error

    def _receive(self, seconds: float) -> list[torch.Tensor | BadClip]:
        if not self._connection.poll(seconds):
            raise TimeoutError
        answers = self._connection.recv()
        if isinstance(answers, BaseException):
            raise answers
        return [answer if isinstance(answer, BadClip) else self._receive_clip(answer) for answer in answers]

    def _receive_clip(self, shape: torch.Size) -> torch.Tensor:
        clip = torch.empty(shape)
        self._connection.recv_bytes_into(memoryview(clip.numpy()).cast("B"))
        return clip

    def _lose_process(self) -> str:
        """End the child if it still runs. Returns what happened to it."""
        process, self._process = self._process, None
        running = process.is_alive()
        if running:
            process.join(timeout=0.5)  # it may be just ending
            running = process.is_alive()
        if running:
            process.kill()
        process.join()
        self._connection.close()
        self.restarts += 1
        if running:
            return f"decoding hung for more than {self.time_limit:g} s"
        code = process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"decoding crashed ({how})"


def _serve(connection: Connection, make_decoder: Callable[[], Decoder]) -> None:
    """The child: answer requests until the other end is closed."""
    # Ctrl-C belongs to the parent, which closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        decoder = make_decoder()
    except Exception as error:  # it travels to the parent
        connection.send(error)
        return
    connection.send(None)
    while True:
        try:
            requests = connection.recv()
        except (EOFError, OSError):
            break
        try:
            answers = decoder.decode(requests)
        except Exception as error:  # it travels to the parent
            connection.send(error)
            continue
        connection.send([answer if isinstance(answer, BadClip) else answer.shape for answer in answers])
        for answer in answers:
            if not isinstance(answer, BadClip):
                connection.send_bytes(memoryview(answer.contiguous().numpy()).cast("B"))
    decoder.close()
