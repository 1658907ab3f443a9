import pytest

from opensora_fast.config.overrides import apply_overrides, parse_override


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("lr=1e-4", ("lr",), 1e-4),
        ("model.depth=4", ("model", "depth"), 4),
        ("dtype=bf16", ("dtype",), "bf16"),
        ("dtype='bf16'", ("dtype",), "bf16"),
        ("dataset.data_path=a/b.csv", ("dataset", "data_path"), "a/b.csv"),
        ("mask_ratios=None", ("mask_ratios",), None),
        ("vae=dict(type='linear')", ("vae",), {"type": "linear"}),
        ("a=b=c", ("a",), "b=c"),
        ("a=''", ("a",), ""),
        ("a=-1", ("a",), -1),
        ("a=2024-05-01x", ("a",), "2024-05-01x"),
    ],
)
def test_parse(text, path, value):
    assert parse_override(text) == (path, value)


@pytest.mark.parametrize(
    "text", ["lr", "=1", "a..b=1", ".a=1", "a.=1", "a=", "a= ", "a b =1", "a=(1,", "a=dict(b=", "a=[x]"]
)
def test_malformed(text):
    with pytest.raises(ValueError, match="override"):
        parse_override(text)


def apply(values, *texts):
    return apply_overrides(values, map(parse_override, texts))


def test_apply_replaces_inside_and_leaves_the_input_alone():
    values = {"bucket_config": {"144p": {1: (0.5, 48), 16: (1.0, 6)}}, "lr": 1.0}
    changed, given = apply(values, "bucket_config.144p.16=(1.0, 2)", "model.depth=3", "lr=2", "lr=3")
    assert changed == {"bucket_config": {"144p": {1: (0.5, 48), 16: (1.0, 2)}}, "lr": 3, "model": {"depth": 3}}
    assert given == {"bucket_config.144p.16": (1.0, 2), "model.depth": 3, "lr": 3}
    assert values == {"bucket_config": {"144p": {1: (0.5, 48), 16: (1.0, 6)}}, "lr": 1.0}


def test_a_dictionary_replaces_the_one_before():
    changed, given = apply({"vae": {"type": "t", "x": 1}}, "vae.x=2", "vae=dict(type='linear')")
    assert changed == {"vae": {"type": "linear"}}
    assert given == {"vae": {"type": "linear"}}


def test_key_below_a_plain_value():
    with pytest.raises(ValueError, match="lr has no keys below it"):
        apply({"lr": 1.0}, "lr.x=2")
