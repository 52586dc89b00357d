"""Text to token ids and back: a checkpoint's tokenizer files, resolved as transformers 5.23 resolves them, no MLX.

Source: transformers 5.23, tokenization_utils_tokenizers.py and tokenization_utils_base.py (behaviour, not code).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import index
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import InputError, TokenizerError
from .chat_template import TEMPLATE_FILE, TEMPLATE_FOLDER, Tool, read_chat_templates, render_chat
from .detokenizer import Detokenizer
from .special_tokens import find_special_ids, read_optional_json, resolve_special_tokens

_FILES = (
    "tokenizer.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder.

    tokenizer.json is what encodes and decodes. As in transformers: `add_bos_token` and `add_eos_token` of
    tokenizer_config.json do nothing beside it (its post-processor stands), stored padding and truncation are off,
    tokens of `added_tokens_decoder` that it lacks are added, and special tokens it lists as ordinary become special.

    Special tokens come from tokenizer_config.json; where that has no `added_tokens_decoder` (old checkpoints),
    special_tokens_map.json goes over it and added_tokens.json adds to it.

    Args:
        folder: The checkpoint folder. Every file but tokenizer.json may be missing.

    Returns:
        The tokenizer, with the checkpoint's chat templates.

    Raises:
        TokenizerError: tokenizer.json is missing, or one of the files is damaged.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        cure = "convert tokenizer.model with transformers" if (folder / "tokenizer.model").is_file() else "download it"
        raise TokenizerError(f"{path} is missing; expected the tokenizer beside the weights; {cure} and try again")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise TokenizerError(
            f"{path} cannot be read ({error}); expected a file of the tokenizers library; download it again"
        ) from error
    config = read_optional_json(folder / "tokenizer_config.json")
    special_ids = find_special_ids(backend)  # a config can clear the flag of one, but decode goes on skipping it
    try:
        special_tokens = resolve_special_tokens(folder, config, backend)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise TokenizerError(
            f"{folder}: the special tokens cannot be read ({error}); expected each token as text or as an object with "
            "`content`; repair tokenizer_config.json or special_tokens_map.json, or download them again"
        ) from error
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    model_config = read_optional_json(folder / "config.json")
    generation_config = read_optional_json(folder / "generation_config.json")
    return Tokenizer(
        backend,
        folder=folder,
        special_tokens=special_tokens,
        special_ids=special_ids | find_special_ids(backend),
        chat_templates=read_chat_templates(folder, config),
        generation_config=generation_config,
        eos_token_ids=_read_eos_token_ids(folder, generation_config, model_config),
        cleans_up_spaces=_cleans_up_spaces(config, backend),
        model_vocab_size=size if isinstance(size := model_config.get("vocab_size"), int) else 0,
    )


@dataclass(frozen=True)
class Encoding:
    """The tokens of a text and where they are in it; from `Tokenizer.encode_with_offsets`, under tokenizers' names.

    Attributes:
        ids: of the tokens.
        offsets: (start, end) in characters of the text, each; tokens that share a character all name it.
        special_tokens_mask: 1 for what the tokenizer put around the text, which stands nowhere in it.
        sequence_ids: 0 for a token of the text, 1 for one of its pair, None for what was put around them.
        word_ids: which piece of its text a token is from, as the tokenizer splits it first; None where that is none.
    """

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    special_tokens_mask: Sequence[int]
    sequence_ids: Sequence[int | None]
    word_ids: Sequence[int | None]

    def pick(self, places: Iterable[int]) -> Encoding:
        """Keep these tokens, in this order."""
        places = list(places)
        return Encoding(*([getattr(self, field.name)[i] for i in places] for field in fields(self)))


class Tokenizer:
    """A checkpoint's tokenizer; `read_tokenizer` makes it. Safe to share: nothing in it changes after it is made.

    Attributes:
        kind: The tokenizers library's name of its algorithm, such as "BPE".
        continuing_subword_prefix: What tokens inside a word begin with, such as "##"; "" for none.
        vocab_size: Number of ids, added tokens included: the largest id plus one.
        special_tokens: Texts of the special tokens by name (`bos_token`, ...), the model's own names included.
        bos_token, eos_token, pad_token, unk_token: Their texts, or None.
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: Their ids, or None.
        eos_token_ids: Every id that ends generation: `eos_token_id` of generation_config.json (one or several), else of
            config.json, and always the tokenizer's own `eos_token`. transformers stops at the first of these that
            exists; chat checkpoints that end a turn with another token than they end a document with often name it in
            one place only, and a model that runs past its turn talks to itself. mlx-lm adds it for the same reason.
        generation_config: The checkpoint's generation_config.json, where its defaults for sampling are; {} without.
        chat_template, tool_template: The texts of the chat templates for prompts without and with tools, or None.
        has_chat_template: Whether there is any chat template, default or not.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        folder: Path,
        special_tokens: Mapping[str, str],
        special_ids: frozenset[int],
        chat_templates: Mapping[str, str],
        eos_token_ids: Iterable[int],
        generation_config: Mapping[str, Any] | None = None,
        cleans_up_spaces: bool = False,
        model_vocab_size: int = 0,
    ) -> None:
        self._backend = backend
        self._folder = folder
        self._chat_templates = dict(chat_templates)
        self._cleans_up_spaces = cleans_up_spaces
        self._special_ids = special_ids
        self.kind: str = type(backend.model).__name__
        self.continuing_subword_prefix: str = getattr(backend.model, "continuing_subword_prefix", None) or ""
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Embedding tables are padded to round sizes; a model may emit an id beyond the tokenizer's, which has no text.
        self._id_count = max(self.vocab_size, model_vocab_size)
        self.special_tokens: dict[str, str] = dict(special_tokens)
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        self.pad_token = special_tokens.get("pad_token")
        self.unk_token = special_tokens.get("unk_token")
        self.bos_token_id = self._id_of(self.bos_token)
        self.eos_token_id = self._id_of(self.eos_token)
        self.pad_token_id = self._id_of(self.pad_token)
        self.unk_token_id = self._id_of(self.unk_token)
        self.generation_config: dict[str, Any] = dict(generation_config or {})
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids: frozenset[int] = frozenset(eos_token_ids).union(own)
        self.has_chat_template = bool(self._chat_templates)
        self.chat_template = self._chat_templates.get("default")
        self.tool_template = self._chat_templates.get("tool_use", self.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into ids. The text of a special token inside it gives that token's id, as in transformers.

        Args:
            text: Any Unicode text.
            add_special_tokens: Whether the tokenizer puts its own begin and end tokens around it.

        Raises:
            InputError: `text` is not a str, or has half of a surrogate pair, which UTF-8 cannot hold.
        """
        _check_text(text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(self, text: str, pair: str | None = None, *, add_special_tokens: bool = True) -> Encoding:
        """Turn text, or a pair of texts, into ids and the places they have in it; arguments and errors as in `encode`.

        An empty second text is none, as in transformers: no token parts the two.
        """
        for given in (text,) if pair is None else (text, pair):
            _check_text(given)
        found = self._backend.encode(text, pair or None, add_special_tokens=add_special_tokens)
        return Encoding(found.ids, found.offsets, found.special_tokens_mask, found.sequence_ids, found.word_ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Turn ids into text.

        `clean_up_tokenization_spaces` of tokenizer_config.json is followed as in transformers: never for BPE, which it
        would corrupt. An id the model has but the tokenizer has not (a padded embedding table) gives no text.

        Args:
            ids: Token ids, each in [0, the larger of `vocab_size` and config.json's).
            skip_special_tokens: Leaves special tokens out.

        Raises:
            InputError: An id is not an integer, or out of range.
        """
        checked = [self._check_id(token_id) for token_id in _each(ids)]
        text = self._backend.decode(checked, skip_special_tokens=skip_special_tokens)
        return _clean_up_spaces(text) if self._cleans_up_spaces else text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """Start turning one stream of ids into text; joined, its pieces are `decode` of all the ids."""
        return Detokenizer(
            self._backend.decoder,
            text_of=lambda token_id: self._text_of(token_id, skip_special_tokens=skip_special_tokens),
            decode=self.decode,
            waits=self._cleans_up_spaces,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation as the text of a prompt; arguments and errors as in `render_chat`.

        The template sees the special tokens by name; `template_variables` go over them.
        """
        return render_chat(
            self._chat_templates,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            template_variables={**self.special_tokens, **(template_variables or {})},
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render a conversation and encode it. No special tokens are added: the template has written them already."""
        prompt = self.apply_chat_template(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            template_variables=template_variables,
        )
        return self.encode(prompt, add_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        """Look up the id of the token whose stored text is `text`; None where there is none."""
        return self._backend.token_to_id(text)

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Give the stored form of each token, "" for an id without one; errors as in `decode`."""
        return [self._text_of(token_id, skip_special_tokens=False) or "" for token_id in _each(ids)]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Turn stored forms into the text that they are together."""
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def shares_vocabulary(self, other: Tokenizer) -> bool:
        """Whether every id is the same token in both."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    def to_json(self) -> str:
        """Write what the tokenizers library would read back; what a grammar's parser is made of."""
        return self._backend.to_str()

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files, byte for byte, from the folder it was read from.

        generation_config.json goes along, since it says where an answer ends; config.json is the model's.

        Raises:
            TokenizerError: A file cannot be copied, or `folder` holds a tokenizer file this tokenizer does not have,
                which would change what the copy means.
        """
        folder = Path(folder)
        sources = _tokenizer_files(self._folder)
        if foreign := sorted(_tokenizer_files(folder) - sources):
            raise TokenizerError(
                f"{folder} has {', '.join(map(str, foreign))}; expected no tokenizer files but this tokenizer's own; "
                "remove them or save into another folder"
            )
        if Path("tokenizer.json") not in sources:
            raise TokenizerError(f"{self._folder} has lost its tokenizer.json; expected it still there; read it again")
        try:
            for name in sources:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not (target.exists() and target.samefile(self._folder / name)):
                    shutil.copyfile(self._folder / name, target)
        except OSError as error:
            raise TokenizerError(f"{folder}: {error}; expected a folder to write to; check space and rights") from error

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _check_id(self, token_id: int) -> int:
        try:
            checked = index(token_id)
        except TypeError:
            checked = None
        if checked is None or isinstance(token_id, bool):
            raise InputError(
                f"token id {token_id!r} is of type {type(token_id).__name__}; expected int; call .tolist() on an array"
            )
        if not 0 <= checked < self._id_count:
            raise InputError(
                f"token id {checked}; expected one in [0, {self._id_count}); "
                "check that model and tokenizer belong together"
            )
        return checked

    def _text_of(self, token_id: int, *, skip_special_tokens: bool) -> str | None:
        """Give the stored form of a token, or None where `decode` would pass over it."""
        checked = self._check_id(token_id)
        return None if skip_special_tokens and checked in self._special_ids else self._backend.id_to_token(checked)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"text is of type {type(text).__name__}; expected str; join or decode it first")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"text has a lone surrogate at position {error.start}; expected valid Unicode; "
            "read the source with errors='replace'"
        ) from error


def _read_eos_token_ids(
    folder: Path, generation_config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> list[int]:
    """Read the ids that end generation: generation_config.json where it names any, else config.json.

    transformers takes no ids at all where generation_config.json is there and names none; a model that never stops
    helps nobody, so config.json is asked then too. A negative id means "none", as nothing equals it.
    """
    for name, source in (("generation_config.json", generation_config), ("config.json", model_config)):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise TokenizerError(
                f"{folder / name}: eos_token_id is {value!r}; expected an int or a list of ints; repair the file"
            )
        return [i for i in ids if i >= 0]
    return []


def _cleans_up_spaces(config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> bool:
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    return bool(config.get("clean_up_tokenization_spaces", False)) and bool(forced or not is_bpe)


def _clean_up_spaces(text: str) -> str:
    """Close the gaps that word-piece tokenizers leave before punctuation and English contractions, in this order."""
    for tail in (".", "?", "!", ","):
        text = text.replace(f" {tail}", tail)
    text = text.replace(" ' ", "'")
    for tail in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {tail}", tail)
    return text


def _tokenizer_files(folder: Path) -> set[Path]:
    """List the tokenizer's files in a folder, relative to it."""
    found = {Path(name) for name in _FILES if (folder / name).is_file()}
    return found | {path.relative_to(folder) for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")}


def _each(ids: Iterable[int]) -> Iterable[int]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InputError(f"ids is of type {type(ids).__name__}; expected a list of ints; wrap a single id in a list")
    return ids
