"""Which words of a text may be replaced, where they stand, and how a replacement is spelt.

A word is a span of characters, so everything around a replaced word stays as it was, character by
character. Needs no torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from typing import NamedTuple

# Words without which a sentence says something else or nothing: articles, pronouns, prepositions,
# conjunctions, auxiliaries, question words and negations, and the letters that tokenised text
# leaves of their short forms (I 'll).
_ENGLISH = """
a an the this that these those such same other another each every either neither both all any some
no none nor not never only own too very so just even also
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves one
who whom whose which what when where why how there here
and or but if because as than then while until unless although though since whether
of at by for with without about against between among into through during before after above below
over under again further to from up down in out on off per via
am is are was were be been being have has had having do does did doing done will would shall should
can cannot could may might must ought let
s t d m ll re ve ca wo
"""
STOP_WORDS = frozenset(_ENGLISH.split())
"""English words that are not replaced, in lower case."""

_TOKEN = re.compile(r"\w+(?:['\u2019]\w+)*")
_POSSESSIVE = re.compile(r"['\u2019][sS]")


class Word(NamedTuple):
    """A word that may be replaced: ``text[start:end]``."""

    text: str
    start: int
    end: int

    @property
    def form(self) -> str:
        """The word as the text has it."""
        return self.text[self.start : self.end]


def find_words(text: str, stop_words: Collection[str] = STOP_WORDS) -> list[Word]:
    """The words of a text that may be replaced, from left to right.

    Those are runs of letters that are no stop-word. Numbers, punctuation and words with digits or
    underscores are never replaced, nor are words with an apostrophe, but for a possessive 's,
    which stays while the word before it is replaced.

    Args:
        text: Any text.
        stop_words: Words to leave alone, in lower case.
    """
    words = []
    for token in _TOKEN.finditer(text):
        start, end = token.span()
        if _POSSESSIVE.match(text, end - 2, end):
            end -= 2
        form = text[start:end]
        # A run of letters beside a combining mark is a part of a word in a script that has them.
        beside = text[max(0, start - 1) : start] + text[end : end + 1]
        if (
            is_word(form)
            and form.lower() not in stop_words
            and not any(unicodedata.category(character).startswith("M") for character in beside)
        ):
            words.append(Word(text, start, end))
    return words


def is_word(form: str) -> bool:
    """Whether all of `form` is letters, as it is of every word and every replacement."""
    return form.isalpha()


def with_case_of(form: str, replacement: str) -> str:
    """`replacement` with an initial capital, or in capitals, where `form` is."""
    if len(form) > 1 and form.isupper():
        return replacement.upper()
    if form[0].isupper():
        return replacement[0].upper() + replacement[1:]
    return replacement
