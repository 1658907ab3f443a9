import pytest

from opensora_fast.cli._options import parse_budget


@pytest.mark.parametrize(("text", "seconds"), [("9m", 540), ("90s", 90), ("1h", 3600), ("540", 540), ("1.5m", 90)])
def test_budgets(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "9 minutes", "-1m", "0s", "m"])
def test_broken_budgets(text):
    with pytest.raises(ValueError, match="--budget .*write a time such as 9m"):
        parse_budget(text)
