"""Stop strings are matched in the text, however it is cut into pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from arcee_mlx.generate.stop import StopMatcher

letters = st.text("ab", max_size=40)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


@settings(max_examples=300, deadline=None)
@given(letters, stops, st.data())
def test_what_passes_is_the_text_before_the_first_stop(text: str, stop: list[str], data: st.DataObject) -> None:
    matcher = StopMatcher(stop)
    passed, rest = "", text
    while rest and not matcher.stopped:
        size = data.draw(st.integers(1, len(rest)))
        passed += matcher.add(rest[:size])
        rest = rest[size:]
    passed += matcher.finish()
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    # The earliest match that the pieces complete first: never later than the earliest in the text that was read.
    read = text[: len(text) - len(rest)]
    found = [place for place in (read.find(s) for s in stop) if place >= 0]
    assert matcher.stopped == bool(found)
    assert passed == (read[: min(found)] if found else text)
    assert bool(found) == bool(places)


def test_a_possible_beginning_is_held_back_and_given_when_it_is_none() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.add(piece) for piece in ("one E", "N", "X two")] == ["one ", "", "ENX two"]
    assert matcher.finish() == ""


def test_the_end_of_the_answer_gives_what_was_held() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.add("so EN") == "so "
    assert matcher.finish() == "EN"


def test_nothing_passes_after_the_stop() -> None:
    matcher = StopMatcher(["."])
    assert matcher.add("a.b") == "a"
    assert matcher.add("c") == "" and matcher.finish() == ""
