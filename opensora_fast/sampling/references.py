"""References: frames of images or videos that a sample keeps or edits, and the mask strategy that says where they go.

A mask strategy is tuples `loop, reference, reference_start, target_start, length, edit_ratio` joined by ";". Numbers
left out at the end of a tuple are those of `0,0,0,0,1,0`; negative starts count from the end. So the modes are:

    text to video or image   no strategy
    animate an image         "0"                   the image becomes the first frame
    extend a video           "0,0,-8,0,8"          its last 8 frames become the first 8
    connect two              "0;0,1,0,-1,1"        the first reference at the start, the second at the end
    edit a video             "0,0,0,0,16,0.4"      16 frames, noised to 40 % of the way and generated again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIELDS = ("loop", "reference", "reference_start", "target_start", "length", "edit_ratio")
DEFAULTS = ("0", "0", "0", "0", "1", "0")


@dataclass(frozen=True)
class Placement:
    """One tuple of a mask strategy: frames of a reference that go into the sample of one loop.

    Attributes:
        loop: number of the loop.
        reference: number of the reference.
        reference_start: first frame taken from it; negative counts from its end.
        target_start: first frame of the sample that it goes to; negative counts from the end.
        length: number of frames. A reference of one frame is repeated.
        edit_ratio: 0 keeps the frames, 1 generates freely.
    """

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0

    def __str__(self) -> str:
        return ",".join(f"{getattr(self, field):g}" for field in FIELDS)


def parse_mask_strategy(strategy: str | None) -> tuple[Placement, ...]:
    """Parse a mask strategy; None and "" place nothing.

    Raises:
        ValueError: names the tuple and the number that is wrong.
    """
    if strategy is None or not strategy.strip():
        return ()
    return tuple(_parse_placement(part, strategy) for part in strategy.split(";"))


def _parse_placement(part: str, strategy: str) -> Placement:
    where = f"mask_strategy {strategy!r}: tuple {part!r}"
    numbers = part.split(",")
    if not part.strip():
        raise ValueError(f"mask_strategy {strategy!r}: a tuple is empty; remove the extra ';'")
    if len(numbers) > len(FIELDS):
        raise ValueError(f"{where} has {len(numbers)} numbers, at most 6 are known: {', '.join(FIELDS)}")
    values: dict[str, int | float] = {}
    for field, text in zip(FIELDS, [*numbers, *DEFAULTS[len(numbers) :]], strict=True):
        try:
            values[field] = float(text) if field == "edit_ratio" else int(text)
        except ValueError:
            kind = "a number from 0 to 1" if field == "edit_ratio" else "a whole number"
            raise ValueError(f"{where}: {field} must be {kind}, got {text.strip()!r}") from None
    for field, lowest in (("loop", 0), ("reference", 0), ("length", 1)):
        if values[field] < lowest:
            raise ValueError(f"{where}: {field} must be at least {lowest}, got {values[field]}")
    if not 0 <= values["edit_ratio"] <= 1:
        raise ValueError(f"{where}: edit_ratio must be a number from 0 to 1, got {values['edit_ratio']:g}")
    return Placement(**values)  # type: ignore[arg-type]


def check_placements(placements: Sequence[Placement], references: int, loops: int, frames: int) -> None:
    """Check what can be checked before the references are read.

    Args:
        references: number of references.
        loops: number of loops.
        frames: of the sample in each loop.

    Raises:
        ValueError: a loop or a reference that does not exist, or frames outside the sample.
    """
    for placement in placements:
        if placement.loop >= loops:
            raise ValueError(
                f"mask_strategy tuple '{placement}': loop {placement.loop} does not come, the loops are 0 to "
                f"{loops - 1}; raise loop or remove the tuple"
            )
        if placement.reference >= references:
            have = f"0 to {references - 1}" if references else "none; give reference_path"
            raise ValueError(
                f"mask_strategy tuple '{placement}': there is no reference {placement.reference}, references: {have}"
            )
        _find_target(placement, frames)


def place_references(
    latents: Tensor, references: Sequence[Tensor], placements: Sequence[Placement], loop: int
) -> Tensor:
    """Copy reference frames into the starting latents of one video, in place.

    Args:
        latents: [C, T, H, W], the starting noise.
        references: each [C, t, H, W].
        placements: those of other loops are passed over; later ones win where they overlap.
        loop: the loop to be sampled.

    Returns:
        float32 [T], the frame mask for sampling: 1 where nothing was placed, else the edit ratio.

    Raises:
        ValueError: frames outside the reference or the sample.
    """
    frames = latents.shape[1]
    mask = torch.ones(frames, device=latents.device)
    for placement in placements:
        if placement.loop != loop:
            continue
        reference = references[placement.reference]
        target = _find_target(placement, frames)
        latents[:, target] = reference[:, find_source(placement, reference.shape[1])].to(latents)
        mask[target] = placement.edit_ratio
    return mask


def find_source(placement: Placement, frames: int) -> slice:
    """The frames that are taken of a reference of so many; ValueError where it has not got them."""
    source = _resolve(placement, "reference_start", frames, f"reference {placement.reference}")
    if frames == 1:
        return slice(0, 1)
    if source.stop > frames:
        raise ValueError(
            f"mask_strategy tuple '{placement}': frames {source.start} to {source.stop - 1} are asked of reference "
            f"{placement.reference}, which has {frames}; shorten length or start earlier"
        )
    return source


def _find_target(placement: Placement, frames: int) -> slice:
    target = _resolve(placement, "target_start", frames, "the sample")
    if target.stop > frames:
        raise ValueError(
            f"mask_strategy tuple '{placement}': frames {target.start} to {target.stop - 1} do not fit into the "
            f"sample of {frames} frames; shorten length or raise num_frames"
        )
    return target


def _resolve(placement: Placement, field: str, frames: int, owner: str) -> slice:
    start = getattr(placement, field)
    if not -frames <= start < frames:
        raise ValueError(
            f"mask_strategy tuple '{placement}': {field} {start} lies outside {owner}, which has {frames} frames; "
            f"use {-frames} to {frames - 1}"
        )
    start = start % frames
    return slice(start, start + placement.length)
