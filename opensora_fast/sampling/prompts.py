"""Prompts of Open-Sora: one text or one for each loop, and references in a JSON suffix.

a car driving on the ocean
|0|a car in a forest|4|a car in the desert                       from loop 0 and from loop 4 on
a sunrise{"reference_path": "wave.png", "mask_strategy": "0"}     with a reference
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

SUFFIX_KEYS = ("reference_path", "mask_strategy")


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt.

    Attributes:
        text: as it was written, without the JSON suffix.
        loop_texts: the text of each loop.
        reference_path: files joined by ";", where the suffix names them.
        mask_strategy: where the suffix gives it; see `opensora_fast.sampling.references`.
    """

    text: str
    loop_texts: tuple[str, ...]
    reference_path: str | None = None
    mask_strategy: str | None = None


def parse_prompt(prompt: str, loops: int) -> Prompt:
    """Parse one prompt that is to be sampled in `loops` loops.

    Raises:
        ValueError: broken JSON, an unknown key in it, or loop texts that do not fit the number of loops.
    """
    text, suffix = _split_suffix(prompt)
    return Prompt(text, _parse_loop_texts(text, loops), suffix.get("reference_path"), suffix.get("mask_strategy"))


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        ValueError: the file is missing, is not UTF-8 text, or holds no prompt.
    """
    try:
        # Not splitlines(), for which separators inside of a text end a line, too.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt_path: cannot read {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompt_path: {path} holds no prompt; write one a line")
    return prompts


def _split_suffix(prompt: str) -> tuple[str, dict[str, str]]:
    # A brace opens a suffix if a key follows or if the prompt ends with one; other braces belong to the text.
    opening = re.search(r'\{\s*"|\{(?=.*\}\s*\Z)', prompt, flags=re.DOTALL)
    if opening is None:
        return prompt, {}
    text, suffix = prompt[: opening.start()], prompt[opening.start() :]
    example = '{"reference_path": "a.png", "mask_strategy": "0"}'
    try:
        values = json.loads(suffix)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"prompt {prompt!r}: {suffix!r} is not valid JSON ({error.msg} at character {error.pos + 1}); "
            f"write it like {example}"
        ) from error
    for key, value in values.items():
        if key not in SUFFIX_KEYS:
            raise ValueError(f"prompt {prompt!r}: unknown key {key!r} in the JSON; write it like {example}")
        if value is not None and not isinstance(value, str):
            raise ValueError(f"prompt {prompt!r}: {key} must be a string, got {value!r}; write it like {example}")
    return text, values


def _parse_loop_texts(text: str, loops: int) -> tuple[str, ...]:
    if not re.match(r"\s*\|\s*\d+\s*\|", text):
        return (text,) * loops
    fields = text.strip().split("|")[1:]
    form = f"prompt {text!r}: write loop texts as |0|text|4|text, and no other |"
    if len(fields) % 2:
        raise ValueError(f"{form}; the last text or number is missing")
    starts = []
    for field in fields[::2]:
        if not field.strip().isdecimal():
            raise ValueError(f"{form}; {field!r} is not the number of a loop")
        starts.append(int(field))
    if starts[0] != 0:
        raise ValueError(f"{form}; the first text must start at loop 0, not {starts[0]}")
    for before, after in zip(starts, starts[1:], strict=False):
        if after <= before:
            raise ValueError(f"{form}; loop {after} comes after loop {before}, but the numbers must increase")
    if starts[-1] >= loops:
        raise ValueError(
            f"prompt {text!r}: the text of loop {starts[-1]} is never reached, the loops are 0 to {loops - 1}; "
            f"raise loop to {starts[-1] + 1} or more, or leave the text out"
        )
    ends = [*starts[1:], loops]
    loop_texts: list[str] = []
    for field, start, end in zip(fields[1::2], starts, ends, strict=True):
        loop_texts += [field] * (end - start)
    return tuple(loop_texts)
