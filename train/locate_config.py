"""The configurations that come with the package, by name."""

from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


def locate_config(path: str | Path) -> Path:
    """A file as it is, or the shipped configuration of that name (`stage1`, `train/configs/stage1.py`).

    A folder is no configuration: one that happens to be called `demo` or `video` does not hide the shipped one.

    Raises:
        ValueError: neither; the message lists the shipped names.
    """
    path = Path(path)
    if path.is_file():
        return path
    shipped = FOLDER / f"{path.stem}.py"
    if str(path) in (path.stem, f"train/configs/{path.name}") and shipped.is_file():
        return shipped
    if path.exists():
        return path  # the reader says what is wrong with it
    names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.py")))
    raise ValueError(f"{path}: no such file, and no shipped configuration of that name ({names})")
