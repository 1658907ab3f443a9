"""Decoders that fail in all the ways a library can; they live in a module so that another process can make them."""

import os
import signal
import time
from pathlib import Path

import torch

from opensora_fast.data.decoding.clips import BadClip
from opensora_fast.data.decoding.dali_decoder import DaliDecoder


class FailingDecoder:
    """The path of a request says what happens."""

    def decode(self, requests):
        results = []
        for request in requests:
            if request.path == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if request.path == "exit":
                os._exit(3)
            if request.path == "hang":
                time.sleep(60)
            if request.path == "error":
                raise ZeroDivisionError("an error of the program")
            if request.path == "bad":
                results.append(BadClip(request.row, request.path, "it is bad"))
            else:
                shape = (3, len(request.frames), *request.size)
                results.append(torch.full(shape, float(request.row)).transpose(2, 3).contiguous().transpose(2, 3))
        return results

    def close(self):
        pass


def make_nothing():
    raise ValueError("no decoder here")


def end_at_once():
    os._exit(1)


class CrashingDaliDecoder(DaliDecoder):
    """DALI on the CPU; files named "crash" end its process while its pipeline runs."""

    def __init__(self):
        super().__init__("cpu", threads=1)

    def _run(self, samples):
        outcome = super()._run(samples)
        if any(Path(sample.request.path).stem == "crash" for sample in samples):
            os.kill(os.getpid(), signal.SIGSEGV)
        return outcome
