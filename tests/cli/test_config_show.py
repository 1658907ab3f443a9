import json
from pathlib import Path

from opensora_fast.cli import run

CONFIGS = Path(__file__).parents[2] / "train" / "configs"


def test_values_with_origins(capsys):
    assert run(["config", "show", str(CONFIGS / "stage1.py"), "lr=1e-4", "bucket_config.144p.16=(1.0, 2)"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["lr", "0.0001", "[command", "line]"] for line in lines)
    assert any(line.startswith("seed") and "42" in line and "[stage1.py:" in line for line in lines)
    assert any(line.startswith("ema_decay") and line.endswith("[default]") for line in lines)
    assert any("16: (1.0, 2)" in line for line in lines)
    assert any(line.startswith("note: plugin='zero2' has no effect") for line in lines)


def test_json(capsys):
    assert run(["config", "show", "stage3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "TrainConfig"
    assert shown["values"]["bucket_config"]["value"]["720p"]["16"] == [0.6, 3]
    assert shown["values"]["grad_checkpoint"]["value"] is True
    assert run(["config", "show", "sample", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "SampleConfig"


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_configuration(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "video").mkdir()
    assert run(["config", "show", "video"]) == 0
    (tmp_path / "mine").mkdir()
    assert run(["config", "show", "mine"]) == 1
    assert "mine is a folder" in capsys.readouterr().err


def test_a_file_that_is_of_neither_kind_says_what_either_needs(capsys, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("lr = 1e-4\n")
    assert run(["config", "show", str(path)]) == 1
    assert f"{path} has neither bucket_config, which a configuration for training needs, nor image_size" in (
        capsys.readouterr().err
    )
    assert run(["train", str(path), "--dry-run"]) == 1
    assert f"{path}: bucket_config: is missing" in capsys.readouterr().err
    assert run(["config", "show", str(path), "bucket_config.144p.16=(1.0, 2)", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "TrainConfig"


def test_mistakes(capsys, tmp_path):
    assert run(["config", "show", "stage1", "modle.depth=3"]) == 1
    assert "modle: unknown key; did you mean 'model'?" in capsys.readouterr().err
    assert run(["config", "show", str(tmp_path / "missing.py")]) == 1
    assert "missing.py: no such file" in capsys.readouterr().err
    marker = tmp_path / "marker"
    evil = tmp_path / "evil.py"
    evil.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    assert run(["config", "show", str(evil)]) == 1
    error = capsys.readouterr().err
    assert "evil.py, line 1" in error and "never executed" in error
    assert not marker.exists()
