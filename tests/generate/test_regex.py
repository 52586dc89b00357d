"""A regular expression takes what Python's `re` takes."""

from __future__ import annotations

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcee_mlx import DEMO_MODEL, GenerateOptions, GrammarError, load_tokenizer
from arcee_mlx.generate.grammar import compile_grammar

TOKENIZER = load_tokenizer(DEMO_MODEL)
PIECES = [
    "a",
    "b",
    "B",
    "é",
    "\u0301",
    "½",
    "_",
    "1",
    "٣",
    " ",
    "\x1c",
    "\n",
    ".",
    "[",
    "]",
    "&",
    "~",
    "-",
    "+",
    "\u200d",
]
ATOMS = [
    "a",
    "b",
    "é",
    r"\d",
    r"\D",
    r"\w",
    r"\W",
    r"\s",
    r"\S",
    ".",
    r"\.",
    r"\[",
    r"\-",
    r"\n",
    "1",
    "_",
    "-",
    "&",
    "~",
]
CLASSES = [*[atom for atom in ATOMS if atom not in (".", "-")], "[", "&&", "~~", "a-f", "0-9"]
atoms = st.one_of(
    st.sampled_from(ATOMS),
    st.builds(lambda no, parts: f"[{no}{''.join(parts)}]", st.sampled_from(["", "^", "]", "^]"]),
              st.lists(st.sampled_from(CLASSES), min_size=1, max_size=4)),
)  # fmt: skip
patterns = st.recursive(
    st.builds(lambda atom, times: atom + times, atoms, st.sampled_from(["", "", "*", "+", "?", "{1,2}", "*?"])),
    lambda inner: st.one_of(
        st.builds("".join, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda one, two: f"(?:{one}|{two})", inner, inner),
        st.builds(lambda one: f"(?i:{one})", inner),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(pattern=patterns, texts=st.lists(st.text(st.sampled_from(PIECES), max_size=4), min_size=5, max_size=12))
def test_it_takes_what_re_fullmatch_takes(pattern: str, texts: list[str]) -> None:
    grammar = compile_grammar(TOKENIZER, GenerateOptions(regex=pattern))
    assert grammar is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for text in texts:
            assert grammar.is_complete(text) == (re.fullmatch(pattern, text) is not None), (pattern, text)


@pytest.mark.parametrize("pattern", ["a++", "(ab)*+c", "a?+", "a{1,2}+", r"\\++"])
def test_possessive_quantifiers_are_refused(pattern: str) -> None:
    with pytest.raises(GrammarError, match="possessive"):
        compile_grammar(TOKENIZER, GenerateOptions(regex=pattern))


def test_an_escaped_quantifier_may_be_repeated() -> None:
    grammar = compile_grammar(TOKENIZER, GenerateOptions(regex=r"\++"))
    assert grammar is not None and grammar.is_complete("+++")
