"""Letters that no name may hold."""

import unicodedata

_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def controls(letter: str) -> bool:
    """Whether it controls instead of being shown, or is half of one.

    Letters that turn the direction of writing do, since `gpj.exe` would read as `exe.jpg`.
    """
    return unicodedata.category(letter) in ("Cc", "Cs") or unicodedata.bidirectional(letter) in _TURNS
