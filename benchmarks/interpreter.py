"""Triton's interpreter at a speed at which a whole training run is feasible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def patch_once_a_launch() -> Iterator[None]:
    """Makes the interpreter about three times as fast, with the same results; for a process that does nothing else.

    It patches `triton.language` again for each call of a helper function inside a kernel; once a launch is enough.
    """
    from triton.runtime import interpreter

    original_patch, original_launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[int]] = set()

    @cache
    def visible_languages(function) -> frozenset[int]:
        languages = (interpreter.tl, interpreter.tl.core)
        return frozenset(id(value) for value in function.__globals__.values() if any(value is tl for tl in languages))

    def patch_once(function):
        languages = visible_languages(function)
        if languages in patched:
            return interpreter._LangPatchScope()
        patched.add(languages)
        return original_patch(function)

    def launch(executor, *arguments, **keywords):
        patched.clear()
        return original_launch(executor, *arguments, **keywords)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = original_patch, original_launch
