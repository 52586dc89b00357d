"""Ids to text, piece by piece: joined, the pieces are exactly what decoding all ids at once gives.

tokenizers has `DecodeStream` for this, but it decodes a window and trusts that its text only grows. With byte
fallback it does not: one bad byte turns the whole run of byte tokens before it into replacement characters, after
`DecodeStream` has given them out as text; then it raises. It also has no end (unfinished bytes stay inside), and a run
of undecodable bytes costs it quadratic time. So each step of the checkpoint's decoder is run incrementally here, with
what it still has to know kept as its state: constant work a token, and nothing held longer than the decoder requires.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import decoders

from ..errors import InputError


class Detokenizer:
    """Turns one stream of ids into text, piece by piece; joined, the pieces are `decode` of all the ids.

    A piece comes as soon as no later id can change it: with byte-level BPE at the token that completes a character,
    with byte fallback at the first token after a run of byte tokens. Decoders that look at the whole text (CTC, `</w>`
    suffixes, space clean-up) give everything at `finish`.
    """

    def __init__(
        self,
        decoder: decoders.Decoder | None,
        *,
        text_of: Callable[[int], str | None],
        decode: Callable[[list[int]], str],
        waits: bool = False,
    ) -> None:
        """`Tokenizer.detokenizer` makes one.

        Args:
            decoder: Of the tokenizers library; None where the tokenizer has none.
            text_of: Stored form of a token, None where it is passed over; raises InputError for a bad id.
            decode: Text of ids all at once, for decoders that cannot be run incrementally.
            waits: Whether all text must wait for the end.
        """
        self._text_of = text_of
        self._decode = decode
        self._stages = None if waits else _build_stages(decoder)
        self._held: list[int] = []
        self._is_finished = False

    def add(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain, often "".

        Raises:
            InputError: The id is not an integer or out of range, or the stream is finished.
        """
        if self._is_finished:
            raise InputError(f"token id {token_id} after finish(); expected none; start another detokenizer()")
        token = self._text_of(token_id)
        if token is None:
            return ""
        if self._stages is None:
            self._held.append(token_id)
            return ""
        return self._run([token], self._stages)

    def finish(self) -> str:
        """End the stream and return the rest of the text; unfinished bytes become replacement characters."""
        self._is_finished = True
        if self._stages is None:
            held, self._held = self._held, []
            return self._decode(held)
        rest = [self._run(stage.finish(), self._stages[i:]) for i, stage in enumerate(self._stages, start=1)]
        self._stages = []
        return "".join(rest)

    @staticmethod
    def _run(tokens: list[str], stages: Sequence[_Stage]) -> str:
        for stage in stages:
            tokens = [text for token in tokens for text in stage.add(token)]
        return "".join(tokens)


class _Stage(Protocol):
    """One step of a decoder, run incrementally: takes one token, gives those that are now certain."""

    def add(self, token: str) -> list[str]: ...

    def finish(self) -> list[str]: ...


class _Stateless:
    """A step that holds nothing back."""

    def finish(self) -> list[str]:
        return []


class _EachToken(_Stateless):
    """A library decoder that treats each token on its own, perhaps the first one differently."""

    # Any token that decodes to itself; what comes behind it is how the decoder treats a token that is not the first.
    _BEFORE = "a"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._decoder = decoders.Fuse()
        self._decoder.__setstate__(json.dumps(spec).encode())  # how the library unpickles a decoder of any type
        self._is_first = True

    def add(self, token: str) -> list[str]:
        if self._is_first:
            self._is_first = False
            return [self._decoder.decode([token])]
        before = self._decoder.decode([self._BEFORE])
        return [self._decoder.decode([self._BEFORE, token])[len(before) :]]


class _SpaceBetween(_Stateless):
    """No decoder at all: the library joins the tokens with spaces."""

    def __init__(self) -> None:
        self._separator = ""

    def add(self, token: str) -> list[str]:
        separator, self._separator = self._separator, " "
        return [separator + token]


def _read_byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character; this maps those characters back."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _read_byte_alphabet()


class _ByteLevel:
    """Bytes spelled as characters; a sequence that cannot become UTF-8 is replaced as soon as that is certain."""

    def __init__(self) -> None:
        # Python and the library's Rust replace the same maximal subparts, one U+FFFD each (Unicode 15, section 3.9).
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: str) -> list[str]:
        try:
            data = bytes([_BYTE_OF[char] for char in token])
        except KeyError:  # an added token, stored as plain text
            data = token.encode()
        return [self._utf8.decode(data)]

    def finish(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """`<0xE2>` tokens: a whole run of them is UTF-8, or else every byte of the run is replaced.

    Valid bytes are therefore held until the run ends; once a run is lost, its replacements come at once.
    """

    _BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")

    def __init__(self) -> None:
        self._start_run()

    def _start_run(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._valid: list[str] = []
        self._byte_count = 0
        self._is_lost = False

    def add(self, token: str) -> list[str]:
        byte = self._BYTE.fullmatch(token)
        if byte is None:
            return [*self.finish(), token]
        self._byte_count += 1
        if self._is_lost:
            return ["\ufffd"]
        try:
            self._valid.append(self._utf8.decode(bytes.fromhex(byte[1])))
        except UnicodeDecodeError:
            self._is_lost = True
            return ["\ufffd"] * self._byte_count
        return []

    def finish(self) -> list[str]:
        valid, count, is_lost = self._valid, self._byte_count, self._is_lost
        unfinished = bool(self._utf8.getstate()[0])
        self._start_run()
        if count == 0 or is_lost:
            return []
        return ["\ufffd"] * count if unfinished else ["".join(valid)]


class _StripStart(_Stateless):
    """Drops up to `count` of one character at the very start of the text (the space before the first word)."""

    def __init__(self, char: str, count: int) -> None:
        self._char = char
        self._left = count

    def add(self, token: str) -> list[str]:
        while self._left and token.startswith(self._char):
            token, self._left = token[1:], self._left - 1
        if token:
            self._left = 0
        return [token]


def _build_stages(decoder: decoders.Decoder | None) -> list[_Stage] | None:
    """Build the incremental form of a decoder; None where it has none and the text must wait for the end."""
    if decoder is None:
        return [_SpaceBetween()]
    stages: list[_Stage] = []
    is_fused = False  # whether the steps so far made one text of all tokens
    for spec in _flatten(json.loads(decoder.__getstate__())):
        match spec:
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": str(char), "start": int(count), "stop": 0} if is_fused:
                stages.append(_StripStart(char, count))
            case {"type": "ByteLevel"} if not is_fused:
                stages.append(_ByteLevel())
                is_fused = True
            case {"type": "ByteFallback"} if not is_fused:
                stages.append(_ByteFallback())
            case {"type": "Replace" | "Strip" | "Metaspace" | "WordPiece"} if not is_fused:
                stages.append(_EachToken(spec))
            case _:
                return None
    return stages


def _flatten(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [step for part in spec["decoders"] for step in _flatten(part)]
