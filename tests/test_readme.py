"""What the README and the pages beside it tell one to type exists, and the files that they and the sources name."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from foreign_trainers import get_error, make_model, train
from torch.distributed.run import get_args_parser
from torch.distributed.tensor import DTensor

from opensora_fast import use_kernels
from opensora_fast.cli import list_subcommands, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    page: page.read_text()
    for page in (ROOT / name for name in ("README.md", "train/README.md", "benchmarks/README.md"))
}
BASH = "\n".join(block for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
LINES = [shlex.split(line, comments=True) for line in BASH.splitlines()]
UNDER_TORCHRUN = [words for words in LINES if words and words[0] == "torchrun"]
COMMANDS = [words for words in LINES if words and words[0] == "opensora-fast"]
COMMANDS += [words[words.index("opensora_fast") :] for words in UNDER_TORCHRUN]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_and_their_options_exist(words, capsys):
    name, *rest = words[1:]
    assert name in list_subcommands()
    command = [name]
    assert run([*command, "--help"]) == 0
    help_text = capsys.readouterr().out
    if "COMMAND" in help_text:
        command.append(rest[0])
        assert run([*command, "--help"]) == 0
        help_text = capsys.readouterr().out
    for word in rest:
        if word.startswith("--"):
            assert word in help_text, f"{' '.join(command)} has no {word}"


@pytest.mark.parametrize("words", UNDER_TORCHRUN, ids=" ".join)
def test_torchrun_takes_its_options(words):
    options = get_args_parser().parse_args(words[1:])
    assert options.module and options.training_script == "opensora_fast" and options.nproc_per_node.isdecimal()


def test_there_are_commands_of_every_part():
    assert {words[1] for words in COMMANDS} >= {"data", "buckets", "train", "sample", "bench", "profile", "kernels"}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", BASH, re.MULTILINE)
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_modules_and_paths_exist():
    for text in PAGES.values():
        for folder, module in re.findall(r"(?:PYTHONPATH=(\S+) )?python -m ([\w.]+)", text):
            file = (ROOT / folder / module.replace(".", "/")).with_suffix(".py")
            assert file.exists() if folder else importlib.util.find_spec(module), module
    paths = [ROOT / word for words in LINES for word in words if word.startswith(("tests/", "benchmarks/"))]
    for page, text in PAGES.items():
        paths += [page.parent / link for link in re.findall(r"\]\((?!https:)([^)]+)\)", text)]
    assert len(paths) > 5
    for path in paths:
        assert path.exists(), path


def test_files_that_the_readme_and_the_sources_name_exist():
    folders = ("benchmarks", "kernels", "opensora_fast", "tests", "train")
    named = re.compile(rf"`((?:{'|'.join(folders)})/[\w./]*)`")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in [ROOT / "README.md", *sources]
        for name in named.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert not missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a mesh fully_shard takes the GPU, and the test does not")
# As Open-Sora's own model does in float32; `train` changes it in no place.
@pytest.mark.filterwarnings(r"ignore:FSDP2-wrapped module \(FSDPSTDiT2\) returned a view tensor")
def test_the_lines_for_other_trainers_shard_a_model_that_computes_the_same():
    code = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "fully_shard" in code)
    model, alone = make_model("own"), make_model("own")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        exec(code, {"model": model, "use_kernels": use_kernels})
        assert model.backends.spatial_attention == "triton"
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        use_kernels(model, "reference")
        found = {name: gradient.full_tensor() for name, gradient in train(model, 0).items()}
    finally:
        torch.distributed.destroy_process_group()
    assert get_error(found, train(alone, 0)) < 2e-5


def test_the_first_page_stays_short():
    assert len(README.splitlines()) < 200


def test_the_benchmarks_page_names_each_folder():
    page = ROOT / "benchmarks"
    folders = {path.name for path in page.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))}
    assert folders == set(re.findall(r"`(\w+)/`", PAGES[page / "README.md"]))
