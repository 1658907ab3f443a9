"""Reading the files of weights that trainers write."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_fast.model.checkpoint_files import load_checkpoint_file

GOLDEN = Path(__file__).parents[1] / "golden" / "stdit2_weights.safetensors"


def test_averaged_weights_come_first(tmp_path: Path):
    golden = load_file(GOLDEN)
    torch.save({"model": golden, "ema": {key: value + 1 for key, value in golden.items()}}, tmp_path / "both.pt")
    loaded = load_checkpoint_file(tmp_path / "both.pt")
    assert torch.equal(loaded["t_block.1.bias"], golden["t_block.1.bias"] + 1)


def halves() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    golden = load_file(GOLDEN)
    names = sorted(golden)
    return {key: golden[key] for key in names[::2]}, {key: golden[key] for key in names[1::2]}


def write_index(folder: Path, name: str, files: dict[str, dict[str, Tensor]]) -> None:
    weight_map = {key: file for file, state in files.items() for key in state}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("layout", ["file", "folder", "safetensors shards", "bin shards", "trainer"])
def test_every_layout_of_files(tmp_path: Path, layout: str):
    golden = load_file(GOLDEN)
    first, second = halves()
    source = tmp_path
    if layout == "file":
        source = tmp_path / "any-name.safetensors"
        save_file(golden, source)
    elif layout == "folder":
        save_file(golden, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
    elif layout == "safetensors shards":
        files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
        for name, state in files.items():
            save_file(state, tmp_path / name)
        write_index(tmp_path, "model.safetensors.index.json", files)
    else:  # as ColossalAI writes it, alone or in the checkpoint folder of Open-Sora's trainer beside ema.pt
        folder = tmp_path / "model" if layout == "trainer" else tmp_path
        folder.mkdir(exist_ok=True)
        files = {"pytorch_model-00001.bin": first, "pytorch_model-00002.bin": second}
        for name, state in files.items():
            torch.save(state, folder / name)
        write_index(folder, "pytorch_model.bin.index.json", files)
        if layout == "trainer":
            torch.save({"not": torch.zeros(1)}, tmp_path / "ema.pt")
    loaded = load_checkpoint_file(source)
    assert set(loaded) == set(golden) and all(torch.equal(loaded[key], golden[key]) for key in golden)


def test_nothing_in_a_file_is_executed(tmp_path: Path, code: object):
    torch.save({"state_dict": load_file(GOLDEN), "extra": code}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="could execute code.*torch.save"):
        load_checkpoint_file(tmp_path / "evil.pth")


def test_unreadable_files_are_named(tmp_path: Path):
    torch.save({"state_dict": load_file(GOLDEN)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    for name in ("pointer.bin", "pointer.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save({"optimizer": {"lr": 0.1}}, tmp_path / "optimizer.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, reason in {
        "cut.pth": "not a readable PyTorch file",
        "empty.pt": "is empty: copy it again",
        "pointer.bin": "`git lfs pull` fetches it",
        "pointer.safetensors": "`git lfs pull` fetches it",
        "text.pth": "is no PyTorch file",
        "text.safetensors": "not a readable safetensors file",
        "optimizer.pt": "holds no weights",
        "list.pt": "holds no weights",
        "absent.pth": "",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            load_checkpoint_file(tmp_path / name)


def test_folders_without_one_clear_answer_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no weights"):
        load_checkpoint_file(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save(load_file(GOLDEN), tmp_path / name)
    with pytest.raises(ValueError, match="a.pth, b.pth; name the one"):
        load_checkpoint_file(tmp_path)
    write_index(tmp_path, "x.index.json", {"gone.bin": load_file(GOLDEN)})
    with pytest.raises(ValueError, match="gone.bin: missing"):
        load_checkpoint_file(tmp_path)
    write_index(tmp_path, "x.index.json", {"../a.pth": load_file(GOLDEN)})
    with pytest.raises(ValueError, match="missing"):
        load_checkpoint_file(tmp_path)
    (tmp_path / "x.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        load_checkpoint_file(tmp_path)
