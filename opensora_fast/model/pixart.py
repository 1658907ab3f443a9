"""Starting from other weights: PixArt-α and earlier Open-Sora models.

`STDiT2.from_pretrained` is strict: every weight must be there. A start is not: PixArt-α knows no time, so what it lacks
keeps its initial values, and a report says what was and was not loaded.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint_files import load_checkpoint_file

# What Open-Sora 1.1 added to PixArt-α: an image model cannot have it. Temporal attention starts as the identity (its
# output projection is zero), so a fresh video model makes PixArt's images frame by frame.
ADDED_PARTS = (
    "blocks.*.attn_temp.*",
    "blocks.*.scale_shift_table_temporal",
    "blocks.*.attn.[qk]_norm.*",
    "t_block_temp.*",
    "fl_embedder.*",
    "fps_embedder.*",
    "rope.*",
)

# Tables of positions that older models stored and this one computes.
COMPUTED_TABLES = ("pos_embed", "pos_embed_temporal", "temp_embed")

# Below this share of the parameters outside ADDED_PARTS, a start is a mistake.
MIN_MATCHED = 0.5


@dataclass(frozen=True)
class LoadReport:
    """What a start took from a file; `str` of it is the printed report.

    Attributes:
        source: the file, folder or hub id.
        loaded: keys that were loaded.
        added: keys that the file lacks and that an image model cannot have (`ADDED_PARTS`).
        missing: other keys that the file lacks.
        unexpected: keys of the file that the model lacks.
        mismatched: keys of both with different shapes, (key, shape in the file, shape in the model); not loaded.
        changes: how tensors were adapted, one sentence each.
        matched: loaded share of the parameters outside `ADDED_PARTS`, 0 … 1.
    """

    source: str
    loaded: tuple[str, ...]
    added: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    changes: tuple[str, ...]
    matched: float

    def __str__(self) -> str:
        lines = [
            f"start from {self.source}: {len(self.loaded)} tensors loaded, "
            f"{100 * self.matched:.1f} % of the parameters that an image model has"
        ]
        lines += [f"  adapted: {change}" for change in self.changes]
        mismatched = [f"{key} {list(theirs)} (model: {list(ours)})" for key, theirs, ours in self.mismatched]
        for title, keys in (
            ("initial values kept, new in ST-DiT-2", self.added),
            ("initial values kept, MISSING in the file", self.missing),
            ("initial values kept, ANOTHER SHAPE in the file", mismatched),
            ("in the file, unknown to the model", self.unexpected),
        ):
            if keys:
                lines.append(f"  {title}: {', '.join(_fold_names(keys))}")
        return "\n".join(lines)


def initialize_from(model: nn.Module, source: str | Path, report: Callable[[str], None] | None = print) -> LoadReport:
    """Copies into `model` (an STDiT2) all weights of `source` that fit it; the others keep their values.

    Args:
        source: see `load_checkpoint_file`; or a hub id with safetensors.
        report: gets the report as text; None says nothing.

    Raises:
        ValueError: unreadable, or less than half of the parameters outside `ADDED_PARTS` would be loaded. The model is
            unchanged then.
    """
    found, changes = convert_upstream_state_dict(load_checkpoint_file(source), model)
    own = model.state_dict()
    fits = {key: tensor for key, tensor in found.items() if key in own and tensor.shape == own[key].shape}
    absent = [key for key in own if key not in found]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if not _is_added(name)}
    result = LoadReport(
        source=str(source),
        loaded=tuple(fits),
        added=tuple(key for key in absent if _is_added(key)),
        missing=tuple(key for key in absent if not _is_added(key)),
        unexpected=tuple(key for key in found if key not in own),
        mismatched=tuple(
            (key, tuple(tensor.shape), tuple(own[key].shape))
            for key, tensor in found.items()
            if key in own and key not in fits
        ),
        changes=tuple(changes),
        matched=sum(size for name, size in sizes.items() if name in fits) / sum(sizes.values()),
    )
    if result.matched < MIN_MATCHED:
        hint = "these are the weights of another model"
        if any(key.startswith("transformer_blocks.") for key in found):
            hint = "the file is in diffusers' format; take the original PixArt-α .pth file"
        elif result.mismatched:
            key, theirs, ours = result.mismatched[0]
            hint = f"{key} is {list(theirs)} in the file and {list(ours)} in the model: check hidden_size and num_heads"
        raise ValueError(
            f"{source}: only {100 * result.matched:.1f} % of the model's parameters (temporal parts aside) fit, less "
            f"than {100 * MIN_MATCHED:.0f} %: {len(result.missing)} tensors are missing in the file, "
            f"{len(result.mismatched)} have another shape, {len(result.unexpected)} are unknown to the model; {hint}"
        )
    model.load_state_dict(fits, strict=False)
    if report is not None:
        report(str(result))
    return result


def convert_upstream_state_dict(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Adapts weights of PixArt-α or an earlier Open-Sora to the keys and shapes of `model`, as upstream does.

    Stored position tables go; the 2-D patch convolution [C, 4, 2, 2] gets a time axis; the unconditional caption is cut
    or extended to the model's text length by repeating its last row.

    Returns:
        (state dict, what was changed in sentences). The given tensors and dict are not modified.
    """
    own = model.state_dict()
    changes = [f"{key} left out, positions are computed" for key in COMPUTED_TABLES if key in state]
    converted = {key: tensor for key, tensor in state.items() if key not in COMPUTED_TABLES}

    patch = "x_embedder.proj.weight"
    if patch in converted and converted[patch].ndim == 4:
        converted[patch] = converted[patch].unsqueeze(2)
        changes.append(f"{patch} got a time axis of length 1")

    caption = "y_embedder.y_embedding"
    if caption in converted and converted[caption].ndim == 2 and caption in own:
        rows, wanted = converted[caption].shape[0], own[caption].shape[0]
        if rows > wanted:
            converted[caption] = converted[caption][:wanted]
            changes.append(f"{caption} cut from {rows} to {wanted} rows")
        elif 0 < rows < wanted:
            last = converted[caption][-1:].expand(wanted - rows, -1)
            converted[caption] = torch.cat([converted[caption], last])
            changes.append(f"{caption} extended from {rows} to {wanted} rows by its last one")
    return converted, changes


def _is_added(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in ADDED_PARTS)


def _fold_names(keys: Iterable[str]) -> list[str]:
    """Names without the block's number and `.weight` or `.bias`, and how many: `blocks.*.attn_temp.qkv (56)`."""
    counts: dict[str, int] = {}
    for key in keys:
        folded = re.sub(r"\.(weight|bias)$", "", re.sub(r"\bblocks\.\d+\.", "blocks.*.", key))
        counts[folded] = counts.get(folded, 0) + 1
    return [key if count == 1 else f"{key} ({count})" for key, count in counts.items()]
