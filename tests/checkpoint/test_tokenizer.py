"""Tokenizer files become ids and text, and every stream of ids becomes exactly the text that `decode` gives."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from arcee_mlx.checkpoint.tokenizer import Tokenizer, read_tokenizer
from arcee_mlx.errors import InputError, TokenizerError

CORPUS = ["the cat sat on the mat, and the dog sat on the cat", "naïve café — 東京 🙂 don't stop; it's 1 2 3"] * 4
SPECIAL = ("<|begin|>", "<|end|>", "<|eot|>")


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("added word 東", special=False)])
    return backend


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


def write(folder, backend, **files):
    """Write a checkpoint folder: tokenizer.json, and the JSON files given by name."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


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


def stream(tokenizer, ids, *, skip_special_tokens):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    pieces = [detokenizer.add(token_id) for token_id in ids]
    return pieces, detokenizer.finish()


def streams_exactly(tokenizer, ids):
    for skip in (True, False):
        pieces, rest = stream(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=skip)


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


def test_the_post_processor_adds_special_tokens_only_when_asked(tmp_path):
    backend = byte_level()
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer = read_tokenizer(write(tmp_path, backend, tokenizer_config={"add_bos_token": False}))
    assert tokenizer.encode("cat") == [begin, *tokenizer.encode("cat", add_special_tokens=False)]


def test_stored_padding_and_truncation_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16, pad_token="<|end|>", pad_id=backend.token_to_id("<|end|>"))
    tokenizer = read_tokenizer(write(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("the dog sat on the mat")) == "the dog sat on the mat"
    assert tokenizer.pad_token == "<|end|>"


def test_vocab_size_is_the_largest_id_plus_one(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9, "<unk>": 4}, unk_token="<unk>"))
    tokenizer = read_tokenizer(write(tmp_path, backend))
    assert tokenizer.vocab_size == 10
    streams_exactly(tokenizer, [0, 3, 9, 4])


def eos_ids(folder, generation=None, config=None, eos_token="<|end|>"):
    files = {"generation_config": generation, "config": config, "tokenizer_config": {"eos_token": eos_token}}
    write(folder, byte_level(), **{name: content for name, content in files.items() if content is not None})
    return read_tokenizer(folder).eos_token_ids


def test_generation_config_names_the_ids_that_end_generation_and_the_tokenizers_own_is_added(tmp_path):
    end = byte_level().token_to_id("<|end|>")
    assert eos_ids(tmp_path / "1", {"eos_token_id": [7, 8]}, {"eos_token_id": 9}) == {7, 8, end}
    assert eos_ids(tmp_path / "2", {"eos_token_id": 0}, {"eos_token_id": 9}) == {0, end}
    assert eos_ids(tmp_path / "3", {"temperature": 0.5}, {"eos_token_id": 9}) == {9, end}
    assert eos_ids(tmp_path / "4", {"eos_token_id": None}, {"eos_token_id": [9]}) == {9, end}
    assert eos_ids(tmp_path / "5", None, {"eos_token_id": -1}) == {end}
    assert eos_ids(tmp_path / "6") == {end}
    assert eos_ids(tmp_path / "7", eos_token=None) == frozenset()


@pytest.mark.parametrize("wrong", ["</s>", 1.5, [1, "2"], True])
def test_an_eos_id_of_another_type_names_file_and_key(tmp_path, wrong):
    with pytest.raises(TokenizerError, match=r"generation_config\.json: eos_token_id"):
        eos_ids(tmp_path, {"eos_token_id": wrong})


def test_special_tokens_are_read_as_text_or_object(tmp_path):
    config = {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|eot|>", "lstrip": False, "normalized": False},
        "pad_token": None,
        "image_token": "<|image|>",
    }
    tokenizer = read_tokenizer(write(tmp_path, byte_level(), tokenizer_config=config))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|eot|>", None)
    assert tokenizer.bos_token_id == tokenizer.token_id("<|begin|>") and tokenizer.pad_token_id is None
    assert tokenizer.special_tokens["image_token"] == "<|image|>"
    assert tokenizer.decode([tokenizer.token_id("<|image|>")], skip_special_tokens=True) == ""


def test_special_tokens_map_counts_in_old_checkpoints_only(tmp_path):
    older = {"eos_token": {"content": "<|eot|>", "lstrip": False}, "bos_token": "<|begin|>"}
    config = {"eos_token": "<|end|>"}
    old = read_tokenizer(write(tmp_path / "old", byte_level(), tokenizer_config=config, special_tokens_map=older))
    assert (old.eos_token, old.bos_token) == ("<|eot|>", "<|begin|>")
    config["added_tokens_decoder"] = {}
    new = read_tokenizer(write(tmp_path / "new", byte_level(), tokenizer_config=config, special_tokens_map=older))
    assert (new.eos_token, new.bos_token) == ("<|end|>", None)


def test_tokens_missing_in_tokenizer_json_are_added(tmp_path):
    size = byte_level().get_vocab_size()
    config = {
        "added_tokens_decoder": {str(size): {"content": "<tool>", "special": True, "normalized": False}},
        "additional_special_tokens": ["<more>"],
    }
    tokenizer = read_tokenizer(write(tmp_path, byte_level(), tokenizer_config=config))
    assert tokenizer.token_id("<tool>") == size and tokenizer.vocab_size == size + 2
    assert tokenizer.decode(tokenizer.encode("a<tool>b<more>c"), skip_special_tokens=True) == "abc"


def test_special_flags_of_the_config_go_over_tokenizer_json_and_streams_follow(tmp_path):
    plain = byte_level().token_to_id("added word 東")
    config = {
        "added_tokens_decoder": {
            str(plain): {"content": "added word 東", "special": True},
            "0": {"content": "<|begin|>", "special": False},  # the library goes on skipping it
        },
    }
    tokenizer = read_tokenizer(write(tmp_path, byte_level(), tokenizer_config=config))
    ids = tokenizer.encode("<|begin|>a added word 東")
    assert plain in ids and tokenizer.decode(ids, skip_special_tokens=True) == "a "
    streams_exactly(tokenizer, ids)


def test_a_missing_tokenizer_json_says_which_file_and_what_to_do(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing.*download"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"convert tokenizer\.model"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{}"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    write(tmp_path, byte_level())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("token", [{"text": "<s>"}, {"content": "<s>", "lstrip": "x"}])
def test_a_special_token_of_another_shape_is_an_error_with_a_cure(tmp_path, token):
    write(tmp_path, byte_level(), tokenizer_config={"bos_token": token})
    with pytest.raises(TokenizerError, match="special tokens cannot be read"):
        read_tokenizer(tmp_path)


def full_checkpoint(folder):
    write(
        folder,
        byte_level(),
        tokenizer_config={"eos_token": "<|end|>"},
        special_tokens_map={"bos_token": "<|begin|>"},
        added_tokens={"<new>": 500},
        generation_config={"eos_token_id": 3},
        config={"vocab_size": 600},
    )
    (folder / "chat_template.jinja").write_bytes(b"{{ messages[0].content }}\r\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools", encoding="utf-8")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_copies_the_tokenizers_files_byte_for_byte(tmp_path):
    source = full_checkpoint(tmp_path / "source")
    read_tokenizer(source).save(tmp_path / "new" / "copy")
    expected = contents(source)
    del expected["config.json"]
    assert contents(tmp_path / "new" / "copy") == expected


def test_saving_onto_itself_changes_nothing(tmp_path):
    before = contents(full_checkpoint(tmp_path))
    read_tokenizer(tmp_path).save(tmp_path)
    assert contents(tmp_path) == before


def test_saving_over_another_tokenizers_files_is_refused(tmp_path):
    tokenizer = read_tokenizer(write(tmp_path / "source", byte_level()))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "chat_template.jinja").write_text("other", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        tokenizer.save(tmp_path / "target")
    assert list(contents(tmp_path / "target")) == ["chat_template.jinja"]


def test_chat_ids_are_the_rendered_prompt_without_added_special_tokens(tmp_path):
    backend = byte_level()
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"bos_token": "<|begin|>", "eos_token": "<|eot|>", "chat_template": template}
    tokenizer = read_tokenizer(write(tmp_path, backend, tokenizer_config=config))
    messages = [{"role": "user", "content": "the cat"}]
    assert tokenizer.apply_chat_template(messages) == "<|begin|>user: the cat<|eot|>"
    ids = tokenizer.encode_chat(messages)
    assert ids.count(begin) == 1 and tokenizer.decode(ids) == "<|begin|>user: the cat<|eot|>"
    assert tokenizer.has_chat_template and tokenizer.chat_template == template
    assert tokenizer.apply_chat_template(messages, template_variables={"bos_token": ">"}).startswith(">user")


def test_a_base_model_has_no_chat_template(chars):
    assert isinstance(chars, Tokenizer) and not chars.has_chat_template and chars.chat_template is None
    with pytest.raises(TokenizerError, match="no chat template"):
        chars.apply_chat_template([{"role": "user", "content": "hi"}])


def test_reading_a_tokenizer_loads_no_mlx_jinja2_or_transformers(tmp_path):
    write(tmp_path, byte_level(), tokenizer_config={"chat_template": "{{ messages }}"})
    program = (
        "import sys, arcee_mlx; from pathlib import Path; before = set(sys.modules)\n"
        "from arcee_mlx.checkpoint.tokenizer import read_tokenizer\n"
        "tokenizer = read_tokenizer(Path(sys.argv[1])); tokenizer.detokenizer().add(5)\n"
        "print(sorted({'mlx', 'mlx_lm', 'jinja2', 'transformers', 'torch'} & (set(sys.modules) - before)))"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
