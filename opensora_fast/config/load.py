"""From a configuration file and the command line to a checked configuration that knows where each value came from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from opensora_fast.config.overrides import apply_overrides, parse_override
from opensora_fast.config.schema import ALIASES, SampleConfig, TrainConfig, find_idle_keys
from opensora_fast.config.sections import TypedSection
from opensora_fast.config.upstream_file import ConfigFile, read_config_file
from opensora_fast.suggest import suggest

ConfigT = TypeVar("ConfigT", TrainConfig, SampleConfig)
OPTION = "command line"
# What tells the two kinds of files apart.
TRAINING_KEYS, SAMPLING_KEY = {"dataset", "bucket_config"}, "image_size"


@dataclass(frozen=True)
class LoadedConfig(Generic[ConfigT]):
    """A checked configuration.

    `origins` maps a dotted key that was given to where: `stage1.py:12` or `command line`; a key that is not there has
    its default. `notes` are warnings to show: aliases, and keys without effect.
    """

    config: ConfigT
    path: Path
    origins: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def get_origin(self, key: str) -> str:
        """Where the value of a dotted key comes from, with the parts of it that the command line replaced."""
        replaced = [name for name, origin in self.origins.items() if name.startswith(f"{key}.") and origin == OPTION]
        own = self.origins.get(key, "default")
        return own if own == OPTION or not replaced else f"{own}, {OPTION} ({', '.join(replaced)})"


def load_train_config(
    path: str | Path, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> LoadedConfig[TrainConfig]:
    """Read a training configuration; see `load_config`."""
    file = read_config_file(path)
    if not _is_for_training(file) and SAMPLING_KEY in file.values:
        raise ValueError(
            f"{path} is a configuration for sampling (`opensora-fast sample`), not for training: give one for that, "
            "such as the shipped stage1"
        )
    return load_config(TrainConfig, file, overrides, options)


def load_sample_config(
    path: str | Path, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> LoadedConfig[SampleConfig]:
    """Read a sampling configuration; see `load_config`."""
    file = read_config_file(path)
    if _is_for_training(file):
        raise ValueError(
            f"{path} is a configuration for training (`opensora-fast train`), not for sampling: give one for that, "
            "such as the shipped sample, or demo_sample for a model of the demo"
        )
    return load_config(SampleConfig, file, overrides, options)


def load_any_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig[Any]:
    """Read a configuration of either kind. ValueError also where a file is of neither."""
    file = read_config_file(path)
    keys = {*TRAINING_KEYS, SAMPLING_KEY}
    chosen = keys & set(file.values) or keys & {parse_override(text)[0][0] for text in overrides}
    if not chosen:
        raise ValueError(
            f"{path} has neither bucket_config, which a configuration for training needs, nor {SAMPLING_KEY}, which "
            "one for sampling needs"
        )
    return load_config(TrainConfig if chosen & TRAINING_KEYS else SampleConfig, file, overrides)


def _is_for_training(file: ConfigFile) -> bool:
    return bool(TRAINING_KEYS & set(file.values))


def load_config(
    schema: type[ConfigT],
    file: ConfigFile,
    overrides: Sequence[str],
    options: Mapping[str, Any] | None = None,
) -> LoadedConfig[ConfigT]:
    """Check the values of a file with the command line laid over them.

    Args:
        schema: TrainConfig or SampleConfig.
        file: what `read_config_file` returned.
        overrides: `key.sub=value` texts.
        options: values of command-line options by dotted key (`{"dataset.data_path": "meta.csv"}`); None = not given.

    Raises ValueError that names every unknown key with the nearest known one, and every value that does not fit.
    """
    chosen = [(tuple(key.split(".")), value) for key, value in (options or {}).items() if value is not None]
    values, given = apply_overrides(file.values, [*map(parse_override, overrides), *chosen])
    origins = {key: f"{file.path.name}:{line}" for key, line in file.lines.items()}
    if not file.lines:  # JSON
        origins = dict.fromkeys(_list_keys(file.values), file.path.name)
    for key, value in given.items():
        origins = {name: origin for name, origin in origins.items() if not name.startswith(f"{key}.")}
        origins |= dict.fromkeys([key, *(f"{key}.{name}" for name in _list_keys(value))], OPTION)
    notes = _resolve_aliases(values, origins)
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        raise ValueError(_explain(error, schema, file, origins)) from None
    return LoadedConfig(config, file.path, origins, notes + find_idle_keys(config))


def list_values(config: BaseModel) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a configuration, sections opened; without keys that a section's type does not take."""
    used = config.get_keys_of_type() if isinstance(config, TypedSection) else type(config).model_fields
    for name in type(config).model_fields:
        if name not in used:
            continue
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from ((f"{name}.{key}", inner) for key, inner in list_values(value))
        else:
            yield name, value


def to_json(config: BaseModel) -> str:
    """The whole configuration as JSON that `read_config_file` reads back."""
    return json.dumps(config.model_dump(mode="json"), indent=2)


def _list_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from (f"{name}.{key}" for key in _list_keys(inner))


def _resolve_aliases(values: dict[str, Any], origins: dict[str, str]) -> list[str]:
    read = []
    for alias, name in ALIASES.items():
        section_name, old = alias.split(".")
        new = name.split(".")[1]
        section = values.get(section_name)
        if isinstance(section, dict) and old in section:
            if new in section:
                raise ValueError(f"{alias} is another name of {name}, and both are given; remove one")
            section[new] = section.pop(old)
            origins[name] = origins.pop(alias, "")
            read.append(f"{alias} is read as {name}")
    return [", ".join(read)] if read else []


def _explain(error: ValidationError, schema: type[BaseModel], file: ConfigFile, origins: dict[str, str]) -> str:
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        location = tuple(str(part) for part in problem["loc"])
        known, location = _follow(schema, location)
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            inside = _find_in_sections(schema, key)
            text = f"unknown key; {f'did you mean {inside}?' if inside else suggest(location[-1], known)}"
        elif problem["type"] == "missing":
            text = "is missing"
        else:
            text = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            if not isinstance(problem["input"], dict):
                text += f" (given: {problem['input']!r})"
        problems.setdefault(key, text)  # of a union only the first complaint is shown
    lines = [f"{_locate(key, file, origins)}{key + ': ' if key else ''}{text}" for key, text in problems.items()]
    return "\n".join(lines)


def _find_in_sections(schema: type[BaseModel], key: str) -> str:
    """`'model.depth'`, or several with "or" between them, for a key that only sections have, without a section."""
    sections = {name: field.annotation for name, field in schema.model_fields.items()}
    return " or ".join(
        repr(f"{name}.{key}")
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, BaseModel) and key in section.model_fields
    )


def _follow(schema: type[BaseModel], location: tuple[str, ...]) -> tuple[list[str], tuple[str, ...]]:
    """Known keys of the section that the location's last part lies in, and the location as a person would write it."""
    section: type[BaseModel] | None = schema
    known: list[str] = list(schema.model_fields)
    for depth, part in enumerate(location):
        if section is None:
            # pydantic appends the branch of a union (`int`, `tuple[...]`) to the location: not a key of the file
            branches = {"int", "bool", "str", "float", "none"}
            return known, tuple(item for item in location if item not in branches and "[" not in item)
        known = list(section.model_fields)
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        if depth == len(location) - 1:
            break
    return known, location


def _locate(key: str, file: ConfigFile, origins: dict[str, str]) -> str:
    parts = key.split(".") if key else []
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if OPTION in (origins.get(prefix), *(origin for name, origin in origins.items() if name.startswith(f"{key}."))):
            return f"{OPTION}: "
        if prefix in file.lines:
            return f"{file.path}, line {file.lines[prefix]}: "
    return f"{file.path}: "
