"""Processes that compute each micro-batch together: the first of them reads it, the others follow.

So a clip is decoded and encoded once, and what is random is drawn once.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict

import torch

from opensora_fast.data.batch import Batch
from opensora_fast.parallel.sequence import SequenceGroup
from opensora_fast.train.inputs.sources import Source, SourceFacts

Batches = Callable[[int, int], Iterator[Batch]]
TENSORS = ("num_frames", "height", "width", "ar", "fps")
VALUES = ("text", "bucket", "rows", "index", "epoch")


def find_batches(source: Source | None, sequence: SequenceGroup | None) -> tuple[SourceFacts, Batches]:
    """What the batches of this process are like, and where they come from.

    Args:
        source: None where another process of the group reads them.
        sequence: None for a process that computes its micro-batches by itself.
    """
    if sequence is None:
        return source.get_facts(), source.loader.iterate
    facts = SourceFacts(**sequence.tell(source and asdict(source.get_facts())))
    return facts, follow(sequence) if source is None else lead(source.loader.iterate, sequence)


def lead(batches: Batches, sequence: SequenceGroup) -> Batches:
    """`batches(epoch, consumed)`, of which the others of the group are told: each batch when it is taken."""

    def iterate(epoch: int, consumed: int) -> Iterator[Batch]:
        with closing(batches(epoch, consumed)) as own:
            for batch in own:
                sequence.tell(
                    {name: getattr(batch, name) for name in VALUES}
                    | {name: getattr(batch, name).tolist() for name in TENSORS}
                )
                yield batch
        sequence.tell(None)

    return iterate


def follow(sequence: SequenceGroup) -> Batches:
    """The batches of which the first of the group tells, without what is in them; its position is that of all."""

    def iterate(epoch: int, consumed: int) -> Iterator[Batch]:
        while (told := sequence.tell(None)) is not None:
            told |= {name: torch.tensor(told[name], dtype=torch.float32) for name in TENSORS}
            told |= {name: tuple(told[name]) for name in ("bucket", "rows")}
            yield Batch(video=None, **told)

    return iterate
