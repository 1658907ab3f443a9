"""Caption cleaning: the text that the T5 encoder of the released model expects.

The released weights were trained on captions cleaned by a fixed list of edits, applied twice (an edit can uncover work
for an earlier one). Another cleaning shifts the text embeddings, so the order and the oddities are kept: only the
scheme of a URL without a known domain goes, digits of exactly four after `#` stay, an apostrophe at the very end goes.

The edits are data: each stage below is a list of `Edit(what, pattern, replacement)` carried out from top to bottom.
Between the stages stand the three steps that are no regular expression: markup, separators, and text repair.

A pattern looks at a run of letters once, not from each of its places anew: in a text of 50 000 letters without a space
it would take half a minute otherwise.
"""

import html
import re
from typing import NamedTuple
from urllib.parse import unquote_plus

# Domains and file name endings that mark a URL and a file name.
DOMAINS = "com|co|ru|net|org|edu|gov|it"
FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# Punctuation that a caption does not need; a run of it becomes one space.
CLUTTER = "#®•©™&@·º½¾¿¡§~()[]{}|\\/*"

# Every kind of dash, as code points and ranges.
DASHES = (
    r"\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
    r"\ufe63\uff0d"
)

# A caption with more hyphens and underscores than this uses them in place of spaces.
MAX_SEPARATORS = 3


class Edit(NamedTuple):
    """One replacement: what it is for, what it matches, what it leaves."""

    what: str
    pattern: re.Pattern[str]
    replacement: str


def _edits(*rows: tuple[str, str, str]) -> tuple[Edit, ...]:
    return tuple(Edit(what, re.compile(pattern), replacement) for what, pattern, replacement in rows)


def _url(scheme: str) -> str:
    """A URL; or, as group 1, letters of a host without a known domain, so that none is looked for inside of them."""
    letters = r"a-zA-Z0-9.\-"
    host = rf"[{letters}]+\.(?:{DOMAINS})[\w/-]*\b/?(?!@)"
    none = rf"([{letters}]+?)(?=\b{scheme}:|[^{letters}]|\Z)"
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{host}|{none})"


BEFORE_MARKUP = _edits(
    ("placeholder of a person", "<person>", "person"),
    ("scheme of a URL, or a bare host and its path", _url("https?"), r"\1"),
    ("the same after `www:`", _url("www"), r"\1"),
)

AFTER_MARKUP = _edits(
    ("nickname", r"@\w+\b", ""),
    ("CJK strokes, enclosed and compatibility forms, hexagrams, ideographs", r"[\u31c0-\u9fff]+", ""),
    ("any dash", f"[{DASHES}]+", "-"),
    ("double quotation mark", "[`´«»“”¨]", '"'),
    ("single quotation mark", "[‘’]", "'"),
    ("left-over quot entity", "&quot;?", ""),
    ("left-over amp entity", "&amp", ""),
    ("IP address", r"(?:\d{1,3}\.){3}\d{1,3}", " "),
    ("article number at the end", r"\d:\d\d\s+$", ""),
    ("written-out line break", r"\\n", " "),
    ("hash number, but for four digits (a year)", r"#(?:\d{1,3}|\d{5,})\b", ""),
    ("long number", r"\b\d{6,}\b", ""),
    ("file name", rf"(?<!\S)\S+\.(?:{FILE_ENDINGS})", ""),
    ("run of quotation marks", "[\"']{2,}", '"'),
    ("run of dots", r"\.{2,}", " "),
    ("clutter", f"[{re.escape(CLUTTER)}]+", " "),
    ("lone dot", r"(?<!\s)\s+\.\s+", " "),
)

AFTER_REPAIR = _edits(
    ("article code such as jc6640", r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    ("article code such as jc6640vc", r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    ("article code such as 6640vc231", r"\b\d+[a-zA-Z]+\d+\b", ""),
    ("shipping offer", r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    ("download offer", r"(?:free\s)?download(?:\sfree)?", ""),
    ("call to click", r"\bclick\b\s(?:for|on)\s\w+", ""),
    ("name of a file format", rf"\b(?:{FILE_ENDINGS})(?:\simages?)?", ""),
    ("page number", r"\bpage\s+\d+\b", ""),
    ("mixed code such as j2d1a2a", r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),
    ("size such as 30x40 (Latin x, Cyrillic х or ×)", r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),
    ("spaces around a colon", r"\b\s+:\s+", ": "),
    ("missing space after punctuation", r"(\D[,./])\b", r"\1 "),
    ("run of spaces", r"\s+", " "),
    ("quotation marks around everything", r"^[\"']([\w\W]+)[\"']$", r"\1"),
    ("one stray mark at the start", r"^[',_\-:;]", ""),
    ("one stray mark at the end", r"[',_\-:+]$", ""),
    ("nothing but a dot and a word", r"^\.\S+$", ""),
)

SEPARATOR = re.compile("[-_]")


def clean_caption(caption: str) -> str:
    """Returns the caption in lower case, without URLs, markup, CJK ideographs, codes, advertising and clutter. An empty
    string is a possible result."""
    return clean_once(clean_once(caption))


def clean_once(caption: str) -> str:
    """What `clean_caption` does twice."""
    import ftfy

    caption = unquote_plus(caption).strip().lower()
    caption = _apply(BEFORE_MARKUP, caption)
    caption = _text_of_markup(caption)
    caption = _apply(AFTER_MARKUP, caption)
    if len(SEPARATOR.findall(caption)) > MAX_SEPARATORS:
        caption = SEPARATOR.sub(" ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return _apply(AFTER_REPAIR, caption).strip()


def _apply(edits: tuple[Edit, ...], text: str) -> str:
    for edit in edits:
        text = edit.pattern.sub(edit.replacement, text)
    return text


def _text_of_markup(text: str) -> str:
    """The text between the tags, entities resolved, as an HTML parser reads it; as it is where the parser gives up."""
    if "<" not in text and "&" not in text:
        return text
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup

    try:
        # An empty tag in front changes nothing in the text, and keeps the parser from warning that a caption without
        # tags looks like a file name or a URL.
        return BeautifulSoup("<i></i>" + text, features="html.parser").get_text()
    except ParserRejectedMarkup:  # such as "<![" without an end: one odd caption must not end a run
        return text
