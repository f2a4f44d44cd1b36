"""Errors about words: what was wanted, what is allowed, and which of it comes nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: object, allowed: Iterable[str]) -> str:
    """ ": did you mean 'WORD'?" with the allowed word that comes nearest, or nothing if none comes near."""
    found = difflib.get_close_matches(str(word).lower(), list(allowed), n=1, cutoff=0.6)
    return f": did you mean {found[0]!r}?" if found else ""


def unknown(name: str, word: object, allowed: Iterable[str], others: str = "") -> ValueError:
    """The error of a word that is not one of those allowed; `others`: what is allowed besides, in words."""
    words = list(allowed)
    return ValueError(f"{name} must be one of {', '.join(words)}{others}; got {word!r}{nearest(word, words)}")
