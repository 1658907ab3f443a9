"""How commands read options that take several names."""


def parse_names(option: str, text: str | None) -> list[str] | None:
    """The names of "eager,ours"; None where the option was not given.

    Raises:
        ValueError: a name is missing: "" is none at all, not all of them.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ValueError(f"{option} {text!r}: write names with commas between them, or leave the option out")
    return names
