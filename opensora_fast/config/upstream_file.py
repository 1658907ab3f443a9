"""Read a configuration file in Open-Sora's format: Python assignments, taken from the syntax tree, never executed.

A file is a list of `name = value` lines where a value is a number, string, True, False, None, list, tuple, dictionary
or `dict(key=value, ...)` of such. Anything else (imports, calls, names, arithmetic) is an error that names the line.
A `.json` file with one object is read too, so that the `config.json` of a training run can be used as it is.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A configuration is a few kilobytes; more is a mistake in the path, and deep nesting would exhaust Python's parser.
LARGEST_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class ConfigFile:
    """Values of a configuration file and, for each dotted key (`model.type`), the line that gives it."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]


def read_config_file(path: str | Path) -> ConfigFile:
    """Read `path` (`.py` in Open-Sora's format, or `.json`).

    Raises ValueError with the file and line for anything that is not a plain value, and FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a configuration is a .py file in Open-Sora's format, or a .json file")
    if path.suffix not in (".py", ".json"):
        raise ValueError(f"{path}: a configuration is a .py file in Open-Sora's format, or a .json file")
    with path.open("rb") as file:
        raw = file.read(LARGEST_FILE_BYTES + 1)
    if len(raw) > LARGEST_FILE_BYTES:
        raise ValueError(f"{path} is larger than {LARGEST_FILE_BYTES} bytes: this is not a configuration")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error})") from None
    return _read_json(path, text) if path.suffix == ".json" else _read_python(path, text)


def parse_literal(text: str) -> Any:
    """Value of one expression in the language of configuration files; ValueError where it is not a plain value."""
    try:
        return _LiteralReader("value").read(ast.parse(text.strip(), mode="eval").body, "")
    except (RecursionError, MemoryError):
        raise ValueError("value: nested too deeply") from None


def _read_json(path: Path, text: str) -> ConfigFile:
    try:
        values = json.loads(text, object_pairs_hook=lambda pairs: _make_object(path, pairs))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold one JSON object, not {type(values).__name__}")
    return ConfigFile(path, values, {})


def _make_object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:  # Python's reader would take the last
            raise ValueError(f"{path}: {name!r} is given twice in one object; keep one of them")
        values[name] = value
    return values


def _read_python(path: Path, text: str) -> ConfigFile:
    try:
        tree = ast.parse(text, filename=str(path))
    except SyntaxError as error:
        place = f", line {error.lineno}" if error.lineno else ""
        raise ValueError(f"{path}{place}: not valid Python: {error.msg}") from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{path}: cannot be parsed: {error or 'nested too deeply'}") from None
    reader = _LiteralReader(str(path))
    values: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        try:
            name = _get_assigned_name(statement, path)
            if name in values:
                raise ValueError(f"{path}, line {statement.lineno}: {name} is already set on line {reader.lines[name]}")
            reader.lines[name] = statement.lineno
            values[name] = reader.read(statement.value, name)
        except RecursionError:
            raise ValueError(f"{path}, line {statement.lineno}: nested too deeply") from None
    return ConfigFile(path, values, reader.lines)


def _get_assigned_name(statement: ast.stmt, path: Path) -> str:
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
        raise ValueError(
            f"{path}, line {statement.lineno}: only `name = value` is read here, not {_describe(statement)}; "
            "configuration files are data and are never executed"
        )
    target = statement.targets[0]
    if not isinstance(target, ast.Name):
        raise ValueError(f"{path}, line {statement.lineno}: only a plain name can be set, not `{ast.unparse(target)}`")
    if target.id == "_base_":
        raise ValueError(
            f"{path}, line {statement.lineno}: _base_ (inheritance) is not supported; copy the values here"
        )
    return target.id


class _LiteralReader:
    """Turns syntax nodes into values and notes the line of every dotted key."""

    def __init__(self, source: str):
        self.source = source
        self.lines: dict[str, int] = {}

    def read(self, node: ast.expr, key: str) -> Any:
        if isinstance(node, ast.Constant):
            if isinstance(node.value, (bool, int, float, str, type(None))):
                return node.value
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            number = self.read(node.operand, key)
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                return -number if isinstance(node.op, ast.USub) else number
        elif isinstance(node, (ast.List, ast.Tuple)):
            items = [self.read(element, key) for element in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        elif isinstance(node, ast.Dict):
            return self._read_pairs(list(zip(node.keys, node.values, strict=True)), node, key)
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args
        ):
            return self._read_pairs([(keyword.arg, keyword.value) for keyword in node.keywords], node, key)
        raise self._error(node, key, f"`{ast.unparse(node)[:60]}` is not a plain value")

    def _read_pairs(self, pairs: list[tuple[Any, ast.expr]], parent: ast.expr, key: str) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for name_node, value_node in pairs:
            if name_node is None:
                raise self._error(parent, key, "`**` is not a plain value")
            name = self.read(name_node, key) if isinstance(name_node, ast.expr) else name_node
            if not isinstance(name, (str, int)):
                raise self._error(parent, key, f"{name!r} cannot be a key")
            child = f"{key}.{name}" if key else str(name)
            if name in values:
                raise self._error(value_node, child, f"{name!r} is given twice")
            self.lines[child] = value_node.lineno
            values[name] = self.read(value_node, child)
        return values

    def _error(self, node: ast.expr, key: str, problem: str) -> ValueError:
        return ValueError(
            f"{self.source}, line {node.lineno}: {key or 'value'}: {problem}; only numbers, strings, True, False, "
            "None, lists, tuples, dictionaries and dict(...) are read (configuration files are never executed)"
        )


def _describe(statement: ast.stmt) -> str:
    return f"`{ast.unparse(statement).splitlines()[0][:60]}`"
