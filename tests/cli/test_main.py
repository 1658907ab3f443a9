"""The command line as a whole: help without torch, exit codes, one clear message for a mistake."""

import os
import subprocess
import sys

import pytest

from opensora_fast import cli


@pytest.fixture
def command(monkeypatch):
    """Adds a subcommand `probe-error` that raises what it is given."""

    def use(error):
        class Module:
            @staticmethod
            def command() -> None:
                raise error

        monkeypatch.setattr(cli, "list_subcommands", lambda: {"fail": "Fail."})
        monkeypatch.setattr(cli, "_import_subcommand", lambda name: Module)
        return ["fail"]

    return use


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("bucket 144p: broken table"), 1, "opensora-fast: error: bucket 144p: broken table\n"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), 1, "No such file or directory: a.csv\n"),
        (FileExistsError(17, "File exists", "a.csv"), 1, "File exists: a.csv; a folder is needed where a file stands"),
        (NotADirectoryError(20, "Not a directory", "a/b"), 1, "Not a directory: a/b; a folder is needed where a file"),
        (OSError("disk full"), 1, "opensora-fast: error: disk full\n"),
        (ModuleNotFoundError("x", name="pydantic"), 1, "pydantic is not installed: pip install pydantic; `opensora-f"),
        (
            ModuleNotFoundError("x", name="opensora_fast.benchmarks"),
            1,
            "benchmarks is not installed: `pip",
        ),
        (KeyError("x"), 1, "KeyError: 'x'\n(unexpected: run again with --debug for the traceback)\n"),
        (KeyboardInterrupt(), 130, "opensora-fast: error: stopped by Ctrl-C\n"),
        (EOFError("Ran out of input"), 1, "opensora-fast: error: EOFError: Ran out of input\n"),
    ],
)
def test_an_error_is_one_message_and_a_code(command, capsys, error, code, message):
    assert cli.run(command(error)) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("place", [0, 1])
def test_debug_shows_the_traceback(command, capsys, place):
    arguments = command(ValueError("broken"))
    arguments.insert(place, "--debug")
    assert cli.run(arguments) == 1
    captured = capsys.readouterr().err
    assert "Traceback" in captured and "opensora-fast: error: broken" in captured


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["doctor", "--nonsense"], ["config", "show"], ["config", "nonsense"]]
)
def test_wrong_usage_is_2(capsys, arguments):
    assert cli.run(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "sample", "plan"])
def test_an_option_of_open_sora_that_is_a_key_here_says_so(capsys, name):
    assert cli.run([name, "stage1", "--dtype", "bf16"]) == 2
    hint = "Keys of the configuration are given without dashes, such as lr=1e-4; `opensora-fast config show CONFIG`"
    assert hint in capsys.readouterr().err
    assert cli.run(["doctor", "--dtype"]) == 2  # takes no configuration
    assert hint not in capsys.readouterr().err


def test_under_torchrun_only_what_shares_the_work_is_started(monkeypatch, capsys, tmp_path):
    """Others would do it in every process, into the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert {"demo", "sample", "bench", "data", "kernels"} < set(cli.list_subcommands())
    for name in cli.list_subcommands():
        if name in cli.SEVERAL_PROCESSES:
            assert cli.run([name, "--help"]) == 0
            continue
        assert cli.run([name, "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"opensora-fast, rank 1: error: {name} is the work of one process")
        assert f"run `opensora-fast {name} ...` without torchrun" in error
    assert not any(tmp_path.iterdir())
    assert cli.run(["trian"]) == 2
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "demo", "--out", ""],
        ["train", "demo", "--out="],
        ["sample", "demo_sample", "--prompt", "a", "b", "--save-dir", ""],
        ["bench", "--out", ""],
        ["profile", "attention", "--out", ""],
        ["demo", "--out", ""],
        ["data", "demo", "--out", ""],
        ["data", "probe", ".", "--out", ""],
    ],
)
def test_no_command_writes_into_the_current_folder_for_a_name_that_is_empty(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 1
    option = "--save-dir" if arguments[0] == "sample" else "--out"
    assert f'error: {option} "": name the place, or write . for the current folder' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_near_names_are_suggested(capsys):
    assert cli.run(["docter"]) == 2
    assert "doctor" in capsys.readouterr().err


def test_exit_codes_of_commands_pass_through(monkeypatch, capsys):
    import typer

    class Module:
        @staticmethod
        def command() -> None:
            raise typer.Exit(7)

    monkeypatch.setattr(cli, "list_subcommands", lambda: {"fail": "Fail."})
    monkeypatch.setattr(cli, "_import_subcommand", lambda name: Module)
    assert cli.run(["fail"]) == 7


def test_options_with_several_values(monkeypatch):
    class Module:
        MULTIPLE_VALUES = ("--prompt", "--mask")

    monkeypatch.setattr(cli, "list_subcommands", lambda: {"sample": ""})
    monkeypatch.setattr(cli, "_import_subcommand", lambda name: Module)
    given = ["sample", "c.py", "--prompt", "a", "b", "--size", "1", "2", "--mask", "0,-1", "-1,0", "--loop", "2"]
    expected = ["sample", "c.py", "--prompt", "a", "--prompt", "b", "--size", "1", "2"]
    assert cli._repeat_options(given) == [*expected, "--mask", "0,-1", "--mask", "-1,0", "--loop", "2"]


def test_an_override_behind_an_option_with_several_values_is_none_of_them(monkeypatch):
    class Module:
        MULTIPLE_VALUES = ("--prompt",)
        TAKES_OVERRIDES = True

    monkeypatch.setattr(cli, "list_subcommands", lambda: {"sample": ""})
    monkeypatch.setattr(cli, "_import_subcommand", lambda name: Module)
    given = ["sample", "c.py", "--prompt", "x=1", "b = c", "vae.type=linear", "d"]
    expected = ["sample", "c.py", "--prompt", "x=1", "--prompt", "b = c", "vae.type=linear", "--prompt", "d"]
    assert cli._repeat_options(given) == expected


def test_every_subcommand_has_a_summary_and_help(capsys):
    subcommands = cli.list_subcommands()
    assert {"train", "config", "doctor"} <= set(subcommands)
    for name, summary in subcommands.items():
        assert summary.endswith(".") or ":" in summary, name
        assert cli.run([name, "--help"]) == 0
        assert "Usage" in capsys.readouterr().out


def test_help_needs_no_torch_and_module_equals_script():
    code = "import sys; from opensora_fast.cli import run; print(run(['--help'])); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-2:] == ["0", "False"]
    module = subprocess.run([sys.executable, "-m", "opensora_fast", "--help"], capture_output=True, text=True)
    assert module.returncode == 0 and "opensora-fast" in module.stdout and "train" in module.stdout


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    path = tmp_path / "d\u00e9mo.py"
    path.write_text("num_frames = 4\nimage_size = (144, 256)\n")
    process = subprocess.run(
        [sys.executable, "-m", "opensora_fast", "config", "show", str(path)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "d\\xe9mo.py" in process.stdout
