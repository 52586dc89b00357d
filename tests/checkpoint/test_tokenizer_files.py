"""What a folder's tokenizer files say, and how they are saved again."""

import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models, processors

from arcee_mlx.checkpoint.tokenizer import read_tokenizer
from arcee_mlx.errors import TokenizerError

from tokenizer_data import byte_level, streams_exactly, write


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
