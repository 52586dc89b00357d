"""Ids and text: every stream of ids becomes exactly the text that `decode` gives, and what is neither is refused."""

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from arcee_mlx.checkpoint.tokenizer import Tokenizer, read_tokenizer
from arcee_mlx.errors import InputError, TokenizerError

from tokenizer_data import SPECIAL, byte_level, stream, streams_exactly, write


def byte_level_with_a_token_that_looks_like_a_byte():
    """The library decodes the added token as the byte 0xE9, which is not what it says; streaming must do the same."""
    backend = byte_level()
    backend.add_tokens([AddedToken("é", special=False)])
    return backend


def byte_fallback(strip=True):
    """Llama 2's form: word-start marks, `<0xE2>` tokens, one leading space dropped."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdeforhlwt,.", "▁t", "he", "▁the", "▁▁", "世"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    backend.add_special_tokens(list(SPECIAL))
    return backend


def word_piece(decoder=None):
    pieces = ["[UNK]", *SPECIAL, "the", "cat", "##s", "##ing", ".", ",", "'", "n't", "do", "it", "'s", "not", "s", "!"]
    backend = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoder or decoders.WordPiece()
    backend.add_special_tokens(list(SPECIAL))
    return backend


def metaspace():
    pieces = ["<unk>", *SPECIAL, "▁", "▁a", "b", "▁▁c", "d▁e", "é"]
    backend = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return backend


def no_decoder():
    backend = word_piece()
    backend.decoder = None
    return backend


KINDS = {
    "byte_level": byte_level,
    "byte_level_ambiguous": byte_level_with_a_token_that_looks_like_a_byte,
    "byte_fallback": byte_fallback,
    "byte_fallback_keeping_spaces": lambda: byte_fallback(strip=False),
    "word_piece": word_piece,
    "word_piece_without_cleanup": lambda: word_piece(decoders.WordPiece(cleanup=False)),
    "metaspace": metaspace,
    "no_decoder": no_decoder,
    "ctc": lambda: word_piece(decoders.CTC(pad_token="the", word_delimiter_token=".")),
    "suffix": lambda: word_piece(decoders.BPEDecoder(suffix="s")),
    "word_piece_with_space_cleanup": word_piece,
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    config = {"clean_up_tokenization_spaces": True}
    return {
        name: read_tokenizer(
            write(folder / name, build(), **({"tokenizer_config": config} if name.endswith("space_cleanup") else {}))
        )
        for name, build in KINDS.items()
    }


@pytest.fixture
def chars(kinds):
    return kinds["byte_level"]


def bytes_as_ids(tokenizer, data):
    """Spell bytes in single-byte tokens of the byte-level or byte-fallback tokenizer."""
    if (first := tokenizer.token_id("<0x00>")) is not None:
        return [first + byte for byte in data]
    printable = {*range(33, 127), *range(161, 256)} - {173}
    moved = iter(range(256, 512))
    char_of = [chr(byte if byte in printable else next(moved)) for byte in range(256)]
    return [tokenizer.token_id(char_of[byte]) for byte in data]


@st.composite
def id_lists(draw, tokenizer):
    """Ids as models give them and as they never should: text, random ids, raw bytes, special tokens, cut anywhere."""
    ids = []
    for _ in range(draw(st.integers(1, 4))):
        match draw(st.sampled_from(("text", "ids", "bytes", "special"))):
            case "text":
                ids += tokenizer.encode(draw(st.text(max_size=12)), add_special_tokens=False)
            case "ids":
                ids += draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8))
            case "bytes" if tokenizer.token_id("<0x00>") is not None or tokenizer.token_id("Ġ") is not None:
                near_text = st.sampled_from(list("€🙂é".encode()) + [0x20, 0x41, 0xED, 0xA0, 0x80, 0xC0, 0xF5, 0xFF])
                ids += bytes_as_ids(tokenizer, draw(st.lists(near_text, max_size=10)))
            case _:
                ids.append(tokenizer.token_id(draw(st.sampled_from(SPECIAL))))
    return ids[: draw(st.integers(0, len(ids)))]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_joined_stream_equals_decode_for_every_id_sequence(kinds, kind, data):
    streams_exactly(kinds[kind], data.draw(id_lists(kinds[kind])))


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_text_survives_encoding_and_streaming(kinds, text):
    tokenizer = kinds["byte_level"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, rest = stream(tokenizer, ids, skip_special_tokens=False)
    assert "".join(pieces) + rest == text


def test_single_byte_tokens_spell_every_byte(kinds):
    for kind in ("byte_level", "byte_fallback_keeping_spaces"):
        ids = bytes_as_ids(kinds[kind], "aé€🙂".encode())
        assert kinds[kind].decode(ids) == "aé€🙂"
    assert len(set(bytes_as_ids(kinds["byte_level"], range(256)))) == 256


def test_ascii_text_comes_out_token_by_token(chars):
    ids = chars.encode("the cat sat on 12 mats, and don't stop")
    pieces, rest = stream(chars, ids, skip_special_tokens=True)
    assert pieces == [chars.decode([token_id]) for token_id in ids] and rest == ""


def test_a_split_emoji_comes_out_whole_with_its_last_byte(chars):
    assert stream(chars, bytes_as_ids(chars, "🙂".encode()), skip_special_tokens=True) == (["", "", "", "🙂"], "")


def test_byte_fallback_emoji_waits_for_the_end_of_its_run_because_a_bad_byte_would_undo_it(kinds):
    tokenizer = kinds["byte_fallback"]
    good, bad = bytes_as_ids(tokenizer, "€".encode()), bytes_as_ids(tokenizer, b"\xff")
    letter = [tokenizer.token_id("a")]
    assert stream(tokenizer, good + letter, skip_special_tokens=True) == (["", "", "", "€a"], "")
    assert stream(tokenizer, good + bad + bad, skip_special_tokens=True) == (["", "", "", "\ufffd" * 4, "\ufffd"], "")


def test_unfinished_bytes_become_a_replacement_character_at_the_end(kinds):
    for kind in ("byte_level", "byte_fallback"):
        ids = bytes_as_ids(kinds[kind], b"\xf0\x9f")
        pieces, rest = stream(kinds[kind], ids, skip_special_tokens=True)
        assert pieces == ["", ""] and rest == kinds[kind].decode(ids) and set(rest) == {"\ufffd"}


def test_only_the_first_leading_space_is_dropped(kinds):
    tokenizer = kinds["byte_fallback"]
    the = tokenizer.token_id("▁the")
    assert stream(tokenizer, [the, the], skip_special_tokens=True) == (["the", " the"], "")


def test_special_tokens_are_left_out_or_shown_as_asked(chars):
    ids = [chars.token_id("<|begin|>"), *chars.encode("cat"), chars.token_id("<|eot|>")]
    assert "".join(stream(chars, ids, skip_special_tokens=True)[0]) == "cat"
    assert "".join(stream(chars, ids, skip_special_tokens=False)[0]) == "<|begin|>cat<|eot|>"


class CountingBackend:
    """Stands before a backend and counts the tokens it is asked to turn into text."""

    def __init__(self, backend):
        self._backend = backend
        self.decoded = 0

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._backend.decode(ids, **options)

    def id_to_token(self, token_id):
        self.decoded += 1
        return self._backend.id_to_token(token_id)

    def __getattr__(self, name):
        return getattr(self._backend, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["text", "undecodable"])
def test_a_long_stream_decodes_each_token_once(kinds, kind, content, monkeypatch):
    tokenizer = kinds[kind]
    ids = tokenizer.encode("the cat sat on the mat. ")
    if content == "undecodable" and tokenizer.token_id("<0xFF>") is not None:
        ids = bytes_as_ids(tokenizer, b"\xff")
    ids = (ids * 10_000)[:10_000]
    counting = CountingBackend(tokenizer._backend)
    monkeypatch.setattr(tokenizer, "_backend", counting)
    pieces, rest = stream(tokenizer, ids, skip_special_tokens=True)
    assert counting.decoded <= 2 * len(ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=True)


def test_undecodable_bytes_are_replaced_as_they_come(kinds):
    for kind in ("byte_level", "byte_fallback"):
        pieces, rest = stream(kinds[kind], bytes_as_ids(kinds[kind], b"\xff" * 3000), skip_special_tokens=True)
        assert pieces == ["\ufffd"] * 3000 and rest == ""


def test_a_finished_stream_takes_no_more_ids(chars):
    detokenizer = chars.detokenizer()
    detokenizer.add(chars.encode("cat")[0])
    detokenizer.finish()
    assert detokenizer.finish() == ""
    with pytest.raises(InputError, match="start another"):
        detokenizer.add(5)


def test_streams_do_not_share_state(chars):
    first, second = chars.detokenizer(), chars.detokenizer()
    euro = bytes_as_ids(chars, "€".encode())
    first.add(euro[0])
    assert second.add(chars.encode("a")[0]) == "a"
    assert first.add(euro[1]) + first.add(euro[2]) + first.finish() == "€"


@pytest.mark.parametrize("wrong", [1.0, "1", None, True, [1]])
def test_ids_of_another_type_are_refused(chars, wrong):
    for give in (chars.decode, lambda ids: chars.detokenizer().add(ids[0])):
        with pytest.raises(InputError, match="expected int"):
            give([wrong])


def test_ids_out_of_range_are_refused_by_name(chars):
    for wrong in (-1, chars.vocab_size):
        for give in (chars.decode, lambda ids: chars.detokenizer().add(ids[0])):
            with pytest.raises(InputError, match=rf"token id {wrong}; expected one in \[0, {chars.vocab_size}\)"):
                give([wrong])


@pytest.mark.parametrize("wrong", [7, "text", b"\x01", None])
def test_decode_refuses_what_is_no_list_of_ids(chars, wrong):
    with pytest.raises(InputError, match="expected a list of ints"):
        chars.decode(wrong)


def test_numpy_integers_are_ids(chars):
    numpy = pytest.importorskip("numpy")
    ids = chars.encode("the cat")
    assert chars.decode(numpy.array(ids, dtype=numpy.int32)) == "the cat"


def test_ids_of_a_padded_embedding_table_have_no_text(tmp_path):
    tokenizer = read_tokenizer(write(tmp_path, byte_level(), config={"vocab_size": 1024}))
    ids = [*tokenizer.encode("cat"), 1000]
    assert tokenizer.vocab_size < 1000 and tokenizer.decode(ids) == "cat"
    streams_exactly(tokenizer, ids)
    with pytest.raises(InputError, match=r"\[0, 1024\)"):
        tokenizer.decode([1024])


@pytest.mark.parametrize("wrong", [7, None, b"text", ["text"]])
def test_encode_refuses_what_is_no_text(chars, wrong):
    with pytest.raises(InputError, match="expected str"):
        chars.encode(wrong)


def test_encode_refuses_a_lone_surrogate_and_says_where(chars):
    with pytest.raises(InputError, match="lone surrogate at position 2"):
        chars.encode("ab\ud800")


def test_text_of_a_special_token_gives_its_id(chars):
    assert chars.token_id("<|eot|>") in chars.encode("the cat<|eot|>")


def test_a_base_model_has_no_chat_template(chars):
    assert isinstance(chars, Tokenizer) and not chars.has_chat_template and chars.chat_template is None
    with pytest.raises(TokenizerError, match="no chat template"):
        chars.apply_chat_template([{"role": "user", "content": "hi"}])


def test_offsets_are_of_the_same_ids_and_cover_the_text(chars):
    text = "Grüße <s> 🙂"
    for add_special_tokens in (True, False):
        found = chars.encode_with_offsets(text, add_special_tokens=add_special_tokens)
        assert list(found.ids) == chars.encode(text, add_special_tokens=add_special_tokens)
        own = [
            span for span, is_special in zip(found.offsets, found.special_tokens_mask, strict=True) if not is_special
        ]
        assert own == sorted(own) and {i for span in own for i in range(*span)} == set(range(len(text)))
