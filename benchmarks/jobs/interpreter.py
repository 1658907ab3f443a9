"""Triton's interpreter at a speed at which a whole training run is feasible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch


@contextmanager
def interpret_quickly() -> Iterator[None]:
    """Makes the interpreter several times as fast, with the same results; for a process that does nothing else.

    Of what it does for each operation, this leaves out what the operation does not change:

    - It patches `triton.language` again for each call of a helper function inside a kernel; once a launch is enough.
    - It computes every sum, difference and product of integers in int64 too and compares that with the largest and the
      smallest number there is, for an assertion that it then leaves out, as it does all that are for debugging.
    - It works out the numpy type, the shape and the number of elements of every tile; they follow from its type.
    """
    from triton.language import core
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    with ExitStack() as stack:

        def change(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value))

        launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
        patched: set[frozenset[int]] = set()

        @cache
        def visible_languages(function: Callable) -> frozenset[int]:
            languages = (interpreter.tl, interpreter.tl.core)
            return frozenset(
                id(value) for value in function.__globals__.values() if any(value is tl for tl in languages)
            )

        def patch_once(function: Callable) -> Any:
            languages = visible_languages(function)
            if languages in patched:
                return interpreter._LangPatchScope()
            patched.add(languages)
            return patch_language(function)

        def launch_afresh(executor: Any, *arguments: Any, **keywords: Any) -> Any:
            patched.clear()
            return launch(executor, *arguments, **keywords)

        change(interpreter, "_patch_lang", patch_once)
        change(interpreter.GridExecutor, "__call__", launch_afresh)

        change(builder, "options", replace(builder.options, sanitize_overflow=False))

        numpy_type, make_type, make_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
        numpy_types: dict[str, Any] = {}
        types: dict[tuple, dict[str, Any]] = {}
        tensors: dict[str, dict[str, Any]] = {}

        def find_numpy_type(dtype: core.dtype) -> Any:
            name = dtype.scalar.name
            if name not in numpy_types:
                numpy_types[name] = numpy_type(dtype)
            return numpy_types[name]

        def make_known_type(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
            key = element_ty.name, *[size.value if isinstance(size, core.constexpr) else size for size in shape]
            if key not in types:
                make_type(self, element_ty, shape)
                types[key] = vars(self).copy()
            vars(self).update(types[key])

        def make_known_tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
            if type.name not in tensors:
                make_tensor(self, handle, type)
                tensors[type.name] = {name: value for name, value in vars(self).items() if name != "handle"}
            vars(self).update(tensors[type.name], handle=handle)

        change(interpreter, "_get_np_dtype", find_numpy_type)
        change(core.block_type, "__init__", make_known_type)
        change(core.tensor, "__init__", make_known_tensor)
        yield
