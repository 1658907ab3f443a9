"""The configurations that come with the package, by name."""

from pathlib import Path

FOLDER = Path(__file__).parent / "configs"


def locate_config(path: str | Path) -> Path:
    """A file as it is, or the shipped configuration of that name (`stage1`, `train/configs/stage1.py`).

    Raises:
        ValueError: neither; the message lists the shipped names.
    """
    path = Path(path)
    if path.exists():
        return path
    shipped = FOLDER / f"{path.stem}.py"
    if str(path) in (path.stem, f"train/configs/{path.name}") and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.py")))
    raise ValueError(f"{path}: no such file, and no shipped configuration of that name ({names})")
