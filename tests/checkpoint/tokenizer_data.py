"""What the tests of the tokenizer share: a byte-level tokenizer, the folder it is written to, streams of ids."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

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


def write(folder, backend, **files):
    """Write a checkpoint folder: tokenizer.json, and the JSON files given by name."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def stream(tokenizer, ids, *, skip_special_tokens):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    pieces = [detokenizer.add(token_id) for token_id in ids]
    return pieces, detokenizer.finish()


def streams_exactly(tokenizer, ids):
    for skip in (True, False):
        pieces, rest = stream(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=skip)
