"""The builds of the attention kernels that `compilation` makes without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configurations import CompileCase, Configuration

# Types of the kernels' arguments by name; all others are pointers to the activations' dtype.
_TYPES = (
    dict.fromkeys(("log_sums", "deltas", "statistics", "cos", "sin"), "*fp32")
    | dict.fromkeys(("partials", "weight_partials", "bias_partials", "query_bias_partials"), "*fp32")
    | dict.fromkeys(("key_bias_partials", "value_bias_partials"), "*fp32")
    | dict.fromkeys(("tiles", "chunks", "blocks", "text_starts", "text_lengths"), "*i32")
    | dict.fromkeys(("num_tokens", "num_tiles", "chunk_tokens", "max_length", "first_text", "partials_stride"), "i32")
    | {"eps": "fp32"}
)


def attention_case(
    name: str,
    kernel: Any,
    configuration: Configuration,
    dtype: str,
    constants: Mapping[str, Any],
    *,
    work: int,
    unit: str = "score",
    note: str = "",
    divisible_by_16: tuple[str, ...] = (),
) -> CompileCase:
    """A build for 16 heads of size 72; `constants` are further ones, all as in `CompileCase`."""
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={key: _TYPES.get(key, f"*{dtype}") for key in kernel.arg_names if not key.isupper()},
        constants={"HEADS": 16, "HEAD_SIZE": 72, **constants},
        configuration=configuration,
        dtype=dtype,
        divisible_by_16=divisible_by_16,
        attention=dtype != "fp32",
        note=note,
        unit=unit,
        work=work,
    )
