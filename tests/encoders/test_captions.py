"""Caption cleaning. Every expected text is what Open-Sora 1.1's own cleaning returns for it."""

import random
import re
import time

import pytest

from opensora_fast.encoders.captions import (
    AFTER_MARKUP,
    AFTER_REPAIR,
    BEFORE_MARKUP,
    DOMAINS,
    FILE_ENDINGS,
    clean_caption,
    clean_once,
)

# caption -> cleaned twice
CASES = {
    "": "",
    "  A Dog  RUNS ": "a dog runs",
    "a+dog%20runs": "a dog runs",
    "a <person> walks": "a person walks",
    "see https://example.com/a/b?c for more": "see ?c for more",
    "see http://host.xyz/path today": "see host. xyz path today",
    "mail a@b.com now": "mail a now",
    "mail someone@b.com now": "mail someone now",
    "by @nick_1 today": "by today",
    "<b>bold</b> &amp; <i>italic</i>": "bold italic",
    "x <script>alert(1)</script> y": "x y",
    "a &lt;b&gt; c": "a c",
    "a 中文 sign": "a sign",
    "dash — and – and ‐": "dash - and - and",
    "„quoted” ‘so’ «thus»": "quoted\" 'so' \"thus",
    "a &quot;word&quot;": 'a "word"',
    "at 127.0.0.1 or 1.2.3": "at or 1.2.3",
    "the clip 5:30 ": "the clip 5:30",
    "line\\nbreak": "line break",
    "nr #12, #1234 and #12345": "nr , 1234 and",
    "code 1234567 ends": "code ends",
    "a picture.png here": "a here",
    "wait... what": "wait what",
    '""" sale """ now': '" sale " now',
    "***SOLD*** (new) [x] {y} a/b\\c ~d": "sold new x y a b c d",
    "end . of it": "end of it",
    "this-is-my-cute-cat": "this is my cute cat",
    "three-dashes-stay-so": "three-dashes-stay-so",
    "one_two_three_four_five": "one two three four five",
    "broken â€™ text": "broken † text",
    "ﬁne ＷＩＤＥ": "fine wide",
    "jc6640 and jc6640vc and 6640vc231": "and and",
    "worldwide free shipping on shoes": "on shoes",
    "free download free of it": "of it",
    "click for more": "",
    "jpeg image of a dog": "of a dog",
    "on page 12 it says": "on it says",
    "code j2d1a2a here": "code here",
    "a 30x40 cm print, 3.5×2": "a cm print",
    "title : text": "title: text",
    "one,two.three": "one, two. three",
    "'quoted'": "quoted",
    "-start": "start",
    "end+": "end",
    ".hidden": "",
    "a &#65; b": "a a b",
    "tab\tand\nnewline": "tab and newline",
}


@pytest.mark.parametrize("caption", CASES)
def test_captions_are_cleaned_as_upstream_does(caption: str):
    assert clean_caption(caption) == CASES[caption]


def test_the_second_pass_matters():
    """An edit of the first pass can uncover work for the second."""
    assert clean_once("a%2520dog") == "a%20dog"
    assert clean_caption("a%2520dog") == "a dog"


def test_markup_that_the_parser_rejects_is_kept():
    """Upstream raises here, which ends its run. The parser of Python 3.14 rejects nothing: to it this is a comment."""
    assert clean_caption("a dog <![odd markup") in ("a dog <! odd markup", "a dog")


def test_every_edit_is_reached():
    """Each edit changes at least one case; an edit that never matches is dead or misplaced."""
    reached = set()
    for edit in (*BEFORE_MARKUP, *AFTER_MARKUP, *AFTER_REPAIR):
        texts = [caption.lower() for caption in CASES] + [
            "www:host.com x",
            "a &quot b",
            "&amp x",
            "at 9:30 ",
            "a\\nb",
        ]
        if any(edit.pattern.sub(edit.replacement, text) != text for text in texts):
            reached.add(edit.what)
    assert {edit.what for edit in (*BEFORE_MARKUP, *AFTER_MARKUP, *AFTER_REPAIR)} == reached


def test_any_string_is_cleaned():
    """No input raises, and the result is a stripped string."""
    generator = random.Random(0)
    alphabet = "abAB01 .,:;-_'\"<>&#@/\\%+()[]!\n\tх中—“×\x00\ud800é"
    for _ in range(500):
        caption = "".join(generator.choice(alphabet) for _ in range(generator.randint(0, 40)))
        cleaned = clean_caption(caption)
        assert cleaned == cleaned.strip()
        cleaned.encode()  # text that a tokenizer can take


def test_no_warning_for_captions_that_look_like_files(recwarn: pytest.WarningsRecorder):
    clean_caption("https://x.y/z & w")
    clean_caption("a&b.html")
    assert not list(recwarn)


HOST = rf"[a-zA-Z0-9.\-]+\.(?:{DOMAINS})[\w/-]*\b/?(?!@)"
# Edit -> its pattern as one would write it at first, and what texts may consist of that it almost matches.
PLAIN_PATTERNS = {
    "scheme of a URL, or a bare host and its path": (
        rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{HOST})",
        ["https", "http", ":", "/", "a", "b1", "-", ".", ".com", ".co", "@", " ", "é", "_", "%", "٣", "com"],
    ),
    "the same after `www:`": (
        rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{HOST})",
        ["www", ":", "/", "a", "b1", "-", ".", ".com", ".co", "@", " ", "é", "_", "%", "٣", "com"],
    ),
    "file name": (rf"\S+\.(?:{FILE_ENDINGS})", [".png", ".jpg", ".jpeg", "png", ".", "a", "/", " ", "\n", "\xa0"]),
    "lone dot": (r"\s+\.\s+", [" ", "\n", "\xa0", ".", "a"]),
    "mixed code such as j2d1a2a": (
        r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b",
        ["a", "b", "1", "2", "٣", "é", "_", ".", " "],
    ),
    "size such as 30x40 (Latin x, Cyrillic х or ×)": (
        r"\b\d+\.?\d*[xх×]\d+\.?\d*\b",
        ["1", "2", "٣", "x", "х", "×", ".", "-", "a", "_", " "],
    ),
}


@pytest.mark.parametrize("what", PLAIN_PATTERNS)
def test_patterns_that_look_at_a_run_once_replace_what_the_plain_ones_do(what: str):
    pattern, parts = PLAIN_PATTERNS[what]
    (edit,) = (edit for edit in (*BEFORE_MARKUP, *AFTER_MARKUP, *AFTER_REPAIR) if edit.what == what)
    replacement = "" if r"\1" in edit.replacement else edit.replacement
    generator = random.Random(0)
    for _ in range(20_000):
        text = "".join(generator.choice(parts) for _ in range(generator.randint(1, 14)))
        assert edit.pattern.sub(edit.replacement, text) == re.sub(pattern, replacement, text)


@pytest.mark.parametrize(
    "caption",
    [
        pytest.param("a." * 25_000, id="dots"),
        pytest.param("a" + " " * 200_000 + "b", id="spaces"),
        pytest.param("a" * 200_000, id="letters"),
        pytest.param("1" * 50_000 + "_", id="digits"),
        pytest.param("a1a" + "1" * 50_000 + "_", id="mixed code"),
    ],
)
def test_time_grows_with_the_length_of_a_run_and_not_with_its_square(caption: str):
    """A damaged table may have such captions; with patterns that begin anew at each letter they take ten seconds and
    more each."""
    began = time.perf_counter()
    clean_caption(caption)
    assert time.perf_counter() - began < 5
