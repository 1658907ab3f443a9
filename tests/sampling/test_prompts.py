"""Prompts with loop texts and a JSON suffix."""

import pytest

from opensora_fast.sampling import parse_prompt, read_prompts


def test_a_plain_text_serves_every_loop():
    prompt = parse_prompt("a car, driving on the ocean.", 3)
    assert prompt.text == "a car, driving on the ocean."
    assert prompt.loop_texts == ("a car, driving on the ocean.",) * 3
    assert prompt.reference_path is None and prompt.mask_strategy is None


@pytest.mark.parametrize(
    ("text", "loops", "expected"),
    [
        ("|0|forest", 2, ["forest", "forest"]),
        ("|0|forest|2|desert", 3, ["forest", "forest", "desert"]),
        ("|0|a|1|b|4|c", 6, ["a", "b", "b", "b", "c", "c"]),
    ],
)
def test_loop_texts_hold_until_the_next_one(text, loops, expected):
    assert list(parse_prompt(text, loops).loop_texts) == expected


def test_a_json_suffix_gives_references_and_leaves_the_text():
    prompt = parse_prompt('|0|sea|1|shore{"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,0,-1,1"}', 2)
    assert prompt.loop_texts == ("sea", "shore")
    assert prompt.reference_path == "a.png;b.mp4" and prompt.mask_strategy == "0;0,1,0,-1,1"


@pytest.mark.parametrize("text", ["a {curly} word", "a [bracketed] word", "one | two", "5|0|", "{a} and {b} c"])
def test_other_braces_and_bars_belong_to_the_text(text):
    assert parse_prompt(text, 1).loop_texts == (text,)


@pytest.mark.parametrize(
    ("text", "loops", "named"),
    [
        ("|1|late", 2, "must start at loop 0, not 1"),
        ("|0|a|2|b", 2, "loop 2 is never reached, the loops are 0 to 1; raise loop to 3"),
        ("|0|a|2|b|1|c", 4, "must increase"),
        ("|0|a|1|b|1|c", 4, "loop 1 comes after loop 1, but the numbers must increase"),
        ("|0|a|x|b", 4, "'x' is not the number of a loop"),
        ("|0|a|2", 4, "missing"),
        ('a{"reference_path": "x.png"', 1, "not valid JSON"),
        ('a{"reference_path": }', 1, "not valid JSON"),
        ('a{"reference": "x.png"}', 1, "unknown key 'reference'"),
        ('a{"mask_strategy": 0}', 1, "mask_strategy must be a string, got 0"),
    ],
)
def test_a_malformed_prompt_is_named_with_the_fix(text, loops, named):
    with pytest.raises(ValueError, match=named) as raised:
        parse_prompt(text, loops)
    assert "prompt" in str(raised.value)


def test_prompts_are_read_from_a_file_one_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("first é\n\n  second  \n", encoding="utf-8")
    assert read_prompts(path) == ["first é", "second"]
    path.write_bytes("\ufefffirst\u2028line\r\nsecond\x0cpage\r\n".encode())  # as editors on Windows write
    assert read_prompts(path) == ["first\u2028line", "second\x0cpage"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)
    with pytest.raises(ValueError, match="missing.txt"):
        read_prompts(tmp_path / "missing.txt")
