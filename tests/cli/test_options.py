import pytest

from opensora_fast.cli._options import FOR_SAMPLING, FOR_TRAINING, parse_budget
from opensora_fast.config import TrainConfig, load_any_config
from opensora_fast.train.locate_config import FOLDER


@pytest.mark.parametrize(("text", "seconds"), [("9m", 540), ("90s", 90), ("1h", 3600), ("540", 540), ("1.5m", 90)])
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "9 minutes", "-1m", "0s", "m"])
def test_broken_budgets(text):
    with pytest.raises(ValueError, match="--budget .*write a time such as 9m"):
        parse_budget(text)


def test_help_names_every_shipped_configuration():
    kinds = {path.stem: type(load_any_config(path).config) for path in FOLDER.glob("*.py")}
    for_training = [name for name, kind in kinds.items() if kind is TrainConfig]
    assert sorted(FOR_TRAINING.split(", ")) == sorted(for_training)
    assert sorted(FOR_SAMPLING.split(", ")) == sorted(set(kinds) - set(for_training))
