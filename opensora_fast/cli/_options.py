"""How commands read options that several of them have."""

import re
from typing import Annotated

import typer

CONFIG_HELP = "Configuration in Open-Sora's format, or the name of a shipped one:"
FOR_TRAINING, FOR_SAMPLING = "demo, image, stage1, stage2, stage3, video", "sample, demo_sample"
TRAINING_CONFIG_HELP = f"{CONFIG_HELP} {FOR_TRAINING}."
SAMPLING_CONFIG_HELP = f"{CONFIG_HELP} {FOR_SAMPLING}."
ANY_CONFIG_HELP = f"{CONFIG_HELP} {FOR_TRAINING}, {FOR_SAMPLING}."
OVERRIDES_HELP = "such as lr=1e-4; `opensora-fast config show CONFIG` lists them."
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key.sub=value ...]", help=f"Keys of the configuration to change, {OVERRIDES_HELP}"),
]


def parse_budget(text: str) -> float:
    """Seconds of "9m", "90s", "1h" or "540".

    Raises:
        ValueError: anything else, or no time at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise ValueError(f"--budget {text!r}: write a time such as 9m, 90s or 1h")
    return seconds


def parse_names(option: str, text: str | None) -> list[str] | None:
    """The names of "eager,ours"; None where the option was not given.

    Raises:
        ValueError: a name is missing: "" is none at all, not all of them.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ValueError(f"{option} {text!r}: write names with commas between them, or leave the option out")
    return names
