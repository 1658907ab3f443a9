"""Finding pretrained weights: a local folder, the Hugging Face cache, or a download that is announced before it starts.

Everything is resolved to a folder first and loaded from there, so the libraries that read the weights never touch the
network themselves.
"""

import fnmatch
import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

LFS_POINTER = b"version https://git-lfs"
# So many bytes at so many places stand for a file: training changes nearly every byte of its weights.
SAMPLES, SAMPLE_BYTES = 256, 4096


class Need(NamedTuple):
    """Files that a folder must hold: what they are, and file name patterns, of which one has to match (best first)."""

    what: str
    patterns: tuple[str, ...]

    def match(self, names: list[str]) -> list[str]:
        """The names that match the best pattern which matches anything."""
        for pattern in self.patterns:
            found = fnmatch.filter(names, pattern)
            if found:
                return found
        return []


def locate_pretrained(
    owner: str,
    source: str | Path | None,
    needs: tuple[Need, ...],
    *,
    example: str,
    setting: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder with the files of `source`, a folder or a hub id such as `stabilityai/sd-vae-ft-ema`.

    `owner` is the section of the configuration ("vae", "text_encoder"); messages name `setting`, which is
    `owner`.from_pretrained if None, and give `example`, a hub id.
    `cache_dir`: None is the usual Hugging Face cache. With `local_files_only` nothing is downloaded; otherwise a
    download is announced on stderr with its size. Every failure is a ValueError with the fix.
    """
    setting = setting or f"{owner}.from_pretrained"
    folder = find_folder(owner, setting, source, needs, example, cache_dir, local_files_only)
    return _download(owner, setting, str(source), needs, cache_dir) if folder is None else folder


def find_folder(
    owner: str,
    setting: str,
    source: str | Path | None,
    needs: tuple[Need, ...],
    example: str,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path | None:
    """What `locate_pretrained` takes of a source on this machine; None where it would download. ValueError as there."""
    if not source:
        raise ValueError(f"{setting} is missing: give a local folder, or a hub id such as {example!r}")
    path = Path(source).expanduser()
    if path.is_dir():
        missing = _missing(path, needs)
        if missing:
            raise ValueError(f"{setting}: the folder {path} lacks {'; '.join(missing)}")
        return path
    if path.exists():
        raise ValueError(f"{setting}: {path} is a file; give the folder that holds it and its config.json")
    if reads_as_path(str(source)):
        raise ValueError(
            f"{setting}: there is no folder {path}; put the files of {example} there, or give another "
            f"folder or a hub id"
        )
    cache = _get_cache(cache_dir)
    cached = _find_cached(str(source), cache)
    missing = ["every file"] if cached is None else _missing(cached, needs)
    if not missing:
        return cached
    if local_files_only:
        raise ValueError(
            f"{setting}: {str(source)!r} is no folder here, and the Hugging Face cache {cache} lacks "
            f"{'; '.join(missing)}. local_files_only=True forbids a download: set {owner}.local_files_only=False, or "
            f"run {_by_hand(setting, str(source))}"
        )
    return None


def find_local(source: str | Path, needs: tuple[Need, ...], cache_dir: str | Path | None) -> Path | None:
    """The folder that `locate_pretrained` would take if nothing may be downloaded; None if there is none."""
    path = Path(source).expanduser()
    folder = path if path.is_dir() else _find_cached(str(source), _get_cache(cache_dir))
    return None if folder is None or _missing(folder, needs) else folder


def fingerprint_files(folder: Path, needs: tuple[Need, ...]) -> str:
    """Of the files of a folder that are needed: differs where other weights have taken their place. Seconds for 20 GB,
    as large files are read in places only."""
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    digest = hashlib.sha256()
    for name in sorted(name for need in needs for name in need.match(names)):
        with open(folder / name, "rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{name} {size}\n".encode())
            step = max(SAMPLE_BYTES, size // SAMPLES)
            for place in range(0, size, step):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def load_completely(owner: str, model_class: Any, folder: Path, **options: Any) -> Any:
    """`model_class.from_pretrained(folder, **options)` of diffusers or transformers, which has to fill every weight
    and to use every one of the parts that the model has. A file may hold other parts, as T5's does its decoder.

    Both libraries leave a weight that is not in the file at its random start, and one without a place unused, with no
    more than a warning.

    Raises:
        ValueError: the files do not load, or their weights are not those that config.json describes.
    """
    from safetensors import SafetensorError

    try:
        model, info = model_class.from_pretrained(str(folder), output_loading_info=True, **options)
    except (pickle.UnpicklingError, OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if _comes_from_unpickling(error):  # torch's own text advises to load it all the same
            raise ValueError(
                f"{owner}.from_pretrained: the weights in {folder} hold more than tensors, or are damaged; reading "
                "them could execute code, so they are refused. Take them as .safetensors"
            ) from error
        raise ValueError(
            f"{owner}.from_pretrained: {folder} does not load as {model_class.__name__}: {error}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{owner}.from_pretrained: the weights in {folder} lack {len(missing)} of {model_class.__name__}'s, among "
            f"them {', '.join(missing[:3])}; these are the weights of another model"
        )
    parts = tuple(f"{name}." for name, _ in model.named_children())
    unused = sorted(key for key in info["unexpected_keys"] if key.startswith(parts))
    if unused:
        raise ValueError(
            f"{owner}.from_pretrained: config.json in {folder} describes a smaller model than its weights are of: it "
            f"has no place for {len(unused)} of them, among them {', '.join(unused[:3])}; take both from one model"
        )
    return model


def _comes_from_unpickling(error: BaseException | None) -> bool:
    """Whether the error is that of unpickling, or hides it, as an OSError of diffusers and of transformers 4 does."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    return error is not None


def reads_as_path(source: str) -> bool:
    """Whether a source cannot be a hub id."""
    return source.startswith((".", "~", "/")) or "\\" in source or source.count("/") > 1


def _missing(folder: Path, needs: tuple[Need, ...]) -> list[str]:
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    hollow = {name: reason for name in names if (reason := why_hollow(folder / name))}
    missing = []
    for need in needs:
        if not need.match([name for name in names if name not in hollow]):
            reasons = "".join(f", but {name} {hollow[name]}" for name in need.match(names)[:1])
            missing.append(f"{need.what} ({' or '.join(need.patterns)}{reasons})")
    return missing


def why_hollow(path: Path) -> str:
    """Why a file does not count, or "". Of an empty spiece.model transformers makes a tokenizer that knows no word."""
    with open(path, "rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        return "is empty: copy it again"
    return "is a pointer of Git LFS: `git lfs pull` fetches it" if start == LFS_POINTER else ""


def _get_cache(cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser()


def _find_cached(hub_id: str, cache: Path) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, cache_dir=cache, local_files_only=True))
    except (OSError, ValueError):
        return None


def _by_hand(setting: str, hub_id: str) -> str:
    return f"`hf download {hub_id}` where there is network, then give that folder as {setting}"


def _download(owner: str, setting: str, hub_id: str, needs: tuple[Need, ...], cache_dir: str | Path | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    cache = _get_cache(cache_dir)
    try:
        sizes = {file.rfilename: file.size or 0 for file in HfApi().model_info(hub_id, files_metadata=True).siblings}
        wanted = {name for need in needs for name in need.match(list(sizes))} | set(fnmatch.filter(sizes, "*.json"))
        wanted = {name for name in wanted if "/" not in name}  # folders of a repository hold other things
        print(
            f"{owner}: downloading {hub_id} from the Hugging Face hub into {cache}: "
            f"{sum(sizes[name] for name in wanted) / 1e9:.2f} GB in {len(wanted)} files",
            file=sys.stderr,
            flush=True,
        )
        folder = Path(snapshot_download(hub_id, cache_dir=cache, allow_patterns=sorted(wanted)))
    except Exception as error:  # the hub library's errors share no base class: its HTTP library differs by version
        raise ValueError(
            f"{setting}: {hub_id!r} is no folder here, is not in the Hugging Face cache {cache}, and "
            f"could not be downloaded ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}). Check "
            f"the name and the network, or run {_by_hand(setting, hub_id)}"
        ) from error
    missing = _missing(folder, needs)
    if missing:
        raise ValueError(f"{setting}: the hub's {hub_id!r} lacks {'; '.join(missing)}")
    return folder
