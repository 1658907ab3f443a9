"""Configuration files are read as data: what they may hold, what is refused, and that nothing runs."""

import pytest

from opensora_fast.config.upstream_file import parse_literal, read_config_file


def write(tmp_path, text, name="config.py"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_values_and_lines(tmp_path):
    path = write(
        tmp_path,
        '"""A docstring."""\n'
        "a = 1\n"
        "b = dict(x=-2.5, y=(None, True), z=['s', {'k': +3}])  # a comment\n"
        "c = {\n"
        '    "144p": {1: (0.5, 48), 16: (1.0, 6)},\n'
        '    "256": {1: (0.5, 24)},\n'
        "}\n"
        'd = "two " "parts"\n',
    )
    file = read_config_file(path)
    assert file.values == {
        "a": 1,
        "b": {"x": -2.5, "y": (None, True), "z": ["s", {"k": 3}]},
        "c": {"144p": {1: (0.5, 48), 16: (1.0, 6)}, "256": {1: (0.5, 24)}},
        "d": "two parts",
    }
    assert file.lines["a"] == 2
    assert file.lines["b.y"] == 3
    assert file.lines["c.144p.16"] == 5
    assert file.lines["c.256"] == 6


@pytest.mark.parametrize(
    "text",
    [
        "open({marker!r}, 'w').write('x')",
        "import pathlib; pathlib.Path({marker!r}).touch()",
        "a = open({marker!r}, 'w')",
        "a = [__import__('pathlib').Path({marker!r}).touch()]",
        "a = dict(b=open({marker!r}, 'w'))",
        "a = {{open({marker!r}, 'w'): 1}}",
        "a = f\"{{open({marker!r}, 'w')}}\"",
        "a = (lambda: open({marker!r}, 'w'))()",
        "a = [open(x, 'w') for x in [{marker!r}]]",
        "def f(x=open({marker!r}, 'w')): pass",
        "class A: open({marker!r}, 'w')",
        "a: open({marker!r}, 'w') = 1",
        "with open({marker!r}, 'w') as f: pass",
        "a = 1\nopen({marker!r}, 'w')",
    ],
)
def test_code_is_refused_and_never_runs(tmp_path, text):
    marker = tmp_path / "marker"
    path = write(tmp_path, text.format(marker=str(marker)))
    with pytest.raises(ValueError, match=r"config\.py, line \d"):
        read_config_file(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1 +", "line 1: not valid Python"),
        ("a = 1\nb = a", "line 2: b: `a` is not a plain value"),
        ("a = 2 * 3", r"`2 \* 3` is not a plain value"),
        ("a = dict([1, 2])", "not a plain value"),
        ("a = set()", "not a plain value"),
        ("a = b'bytes'", "not a plain value"),
        ("a = 1j", "not a plain value"),
        ("a = -True", "not a plain value"),
        ("a = -'b'", "not a plain value"),
        ("a = {**{}}", "not a plain value"),
        ("a = dict(**{})", "not a plain value"),
        ("a = {(1, 2): 3}", r"\(1, 2\) cannot be a key"),
        ("a = 1\na = 2", "line 2: a is already set on line 1"),
        ("a = {1: 2, 1: 3}", "a.1: 1 is given twice"),
        ("a.b = 1", "only a plain name can be set"),
        ("a = b = 1", "only `name = value`"),
        ("a += 1", "only `name = value`"),
        ("_base_ = ['x.py']", "_base_ .* is not supported"),
    ],
)
def test_errors_name_line_and_key(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_config_file(write(tmp_path, text))


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("-", "")])
def test_deep_nesting_is_an_error_and_no_crash(tmp_path, opening, closing):
    with pytest.raises(ValueError, match=r"config\.py"):
        read_config_file(write(tmp_path, "a = " + opening * 100_000 + "1" + closing * 100_000))
    for text in ("-" * 2000 + "1", "a" + ".a" * 5000 + " = 1", "a = " + "-" * 2000 + "1"):
        with pytest.raises(ValueError, match=r"config\.py"):
            read_config_file(write(tmp_path, text))


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_config_file(tmp_path)
    with pytest.raises(ValueError, match="config.yaml"):
        read_config_file(write(tmp_path, "a: 1", "config.yaml"))
    with pytest.raises(FileNotFoundError):
        read_config_file(tmp_path / "missing.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_config_file(tmp_path / "binary.py")
    with pytest.raises(ValueError, match=r"config.py: not valid Python: .*null bytes"):
        read_config_file(write(tmp_path, "a = 1\0"))
    with pytest.raises(ValueError, match="larger than"):
        read_config_file(write(tmp_path, "# " + "x" * 2_000_000))


def test_json(tmp_path):
    assert read_config_file(write(tmp_path, '{"a": {"b": [1]}}', "c.json")).values == {"a": {"b": [1]}}
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config_file(write(tmp_path, "{", "c.json"))
    with pytest.raises(ValueError, match="one JSON object"):
        read_config_file(write(tmp_path, "[1]", "c.json"))
    with pytest.raises(ValueError, match=r"c\.json: 'b' is given twice in one object; keep one of them"):
        read_config_file(write(tmp_path, '{"a": {"b": 1, "b": 2}}', "c.json"))


@pytest.mark.parametrize(("name", "text"), [("config.py", "a = 1\r\n"), ("config.json", '{"a": 1}')])
def test_byte_order_mark_and_line_ends_of_windows(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_config_file(path).values == {"a": 1}


def test_parse_literal():
    assert parse_literal(" dict(a=(1, -2)) ") == {"a": (1, -2)}
    with pytest.raises(ValueError, match="not a plain value"):
        parse_literal("print(1)")
    for depth in (2000, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_literal("-" * depth + "1")
