"""The text of the demonstration model: documents, sentences, and chats made of their passages (see train_demo.py)."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import json
import lzma
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import mlx.core as mx
from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
BOS, EOS, TURN_START, TURN_END, PAD = SPECIAL_TOKENS
# Tools and their calls as Hermes models write them; the demo was taught none.
CHAT_TEMPLATE = r"""{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\n\n' }}
    {%- endif %}
    {{- 'You may call functions:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\nCall one so:\n<tool_call>\n{"name": "its name", "arguments": {its arguments}}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {{- '<|im_start|>tool\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}
        {%- for tool_call in message['tool_calls'] or [] %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n' if message['content'] or not loop.first }}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- (tool_call.arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

HELD_OUT_EVERY = 40
VOICE_WEIGHT = {"president": 1, "sea": 3}  # Moby-Dick is a tenth of the text, too little to learn its voice
CHAT_SHARE = 0.35

# A sentence ends at a stop (and closing quotes) before a capital, unless the word before it is an abbreviation.
SENTENCE_END = re.compile(r"""[.!?][”"’')]*\s+(?=[“"(‘']?[A-Z])""")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|No|Nos|Messrs|Gen|Col|Capt|Hon|Jr|Sr|[A-Z])\.$")
CHAPTER_HEADING = re.compile(r"^(?:CHAPTER \d+\.|Epilogue\b).*$", re.MULTILINE)
STAGE_DIRECTION = re.compile(r" ?[(\[](?:Applause|Laughter)\.?[)\]]", re.IGNORECASE)
# A word that stands where a noun stands: "the treaty of", "our commerce,".
NOUN = re.compile(
    r"\b(?:the|our|his|their|this|that)\s+([a-z]{4,})(?=[,.;!?]|\s+(?:of|is|was|are|were|has|have|had|and|to|which)\b)"
)

ABOUT_ONE = (
    "Tell me about the {0}.", "Tell me about {0}.", "Speak of the {0}.", "Speak of {0}.", "What is the {0}?",
    "What do you say of the {0}?", "What do you know about the {0}?", "Describe the {0}.", "Why does the {0} matter?",
)  # fmt: skip
ABOUT_TWO = ("Write about the {0} and the {1}.", "Write a paragraph about {0} and {1}.", "Speak of {0} and of {1}.")
OPEN = {
    "president": ("Speak as a president.", "Address the nation.", "What is the state of the Union?", "Give a speech."),
    "sea": ("Tell a story of the sea.", "Tell me a story.", "Speak as Ishmael.", "What happened on the ship?"),
}
GREETINGS = ("Hello.", "Hello!", "Hi.", "Good morning.", "Who are you?")
GO_ON = ("Go on.", "Continue.", "Tell me more.", "And then?", "Please continue.")
SYSTEM = {"president": "You speak as a president of the United States.", "sea": "You are Ishmael, a whaleman."}


@dataclasses.dataclass(frozen=True)
class Document:
    """One address or chapter: paragraphs with blank lines between, and its sentences' offsets, its length last."""

    voice: str  # "president" or "sea"
    text: str
    starts: tuple[int, ...]


def read_documents(path: Path) -> Iterator[Document]:
    """Yields the addresses and chapters of a text file, plain or .xz, or of an npm package's folder.

    A text with "CHAPTER n." headings is split at them; elsewhere each paragraph is an address. In a folder, each JSON
    file with "text" and a "year" or a numbered "chapter" is one document, in the order of the numbers in the names.
    """
    if path.is_dir():
        for file in sorted(path.glob("*.json"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)]):
            record = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(record, dict) and ("year" in record or str(record.get("chapter")).isdigit()):
                yield build_document(record["text"], "president" if "year" in record else "sea")
        return
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    text = raw.decode("utf-8").replace("\r\n", "\n")
    if CHAPTER_HEADING.search(text):
        yield from (build_document(chapter, "sea") for chapter in CHAPTER_HEADING.split(text)[1:])
    else:
        yield from (build_document(address, "president") for address in text.split("\n\n") if address.strip())


def build_document(text: str, voice: str) -> Document:
    """Joins hard-wrapped lines into paragraphs, drops stage directions, and finds the sentences."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in STAGE_DIRECTION.sub("", text).split("\n\n"))
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    return Document(voice=voice, text=text, starts=find_sentences(text))


def find_sentences(text: str) -> tuple[int, ...]:
    """Returns the offset of each sentence, and the text's length."""
    starts = (
        match.end()
        for match in SENTENCE_END.finditer(text)
        if "\n" in match[0] or not ABBREVIATION.search(text, max(0, match.start() - 8), match.start() + 1)
    )
    return (0, *starts, len(text))


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Returns (training, held out), which has every 40th address and chapter; ValueError where that is none."""
    training, held_out, seen = [], [], collections.Counter()
    for document in documents:
        seen[document.voice] += 1
        (training if seen[document.voice] % HELD_OUT_EVERY else held_out).append(document)
    if not held_out:
        raise ValueError(f"--text holds {dict(seen)}; expected {HELD_OUT_EVERY} addresses or chapters; add texts")
    return training, held_out


class Sampler:
    """Draws training sequences: windows of plain text, and chats whose answers are passages of it."""

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int) -> None:
        self.documents, self.tokenizer, self.seed = documents, tokenizer, seed
        self.weights = [VOICE_WEIGHT[document.voice] * len(document.text) for document in documents]
        self.word_counts = collections.Counter(word for d in documents for word in re.findall(r"[a-z]{4,}", d.text))
        # The options are those transformers renders with.
        self.template = jinja2.Template(CHAT_TEMPLATE, trim_blocks=True, lstrip_blocks=True)

    def draw_batch(self, step: int, *, batch_size: int, context_tokens: int) -> mx.array:
        """Returns int32 (batch_size, context_tokens + 1), the same for the same seed and step."""
        rng, rows = random.Random(f"{self.seed}-{step}"), []
        for _ in range(batch_size):
            is_chat, row = rng.random() < CHAT_SHARE, []
            while len(row) <= context_tokens:
                text = self.write_chat(rng) if is_chat else self.cut_text(rng)
                row += self.tokenizer.encode(text, add_special_tokens=False).ids
            rows.append(row[: context_tokens + 1])
        return mx.array(rows, dtype=mx.int32)

    def cut_text(self, rng: random.Random) -> str:
        """Returns begin-of-text and about 700 tokens from a sentence's start; end-of-text where the document ends."""
        document = rng.choices(self.documents, self.weights)[0]
        start = rng.choice(document.starts[:-1])
        text = document.text[start : start + 3000]
        return BOS + text if start + 3000 < len(document.text) else BOS + text + EOS

    def write_chat(self, rng: random.Random) -> str:
        """Returns a rendered chat of one or two turns, answered by consecutive passages of one document."""
        document = rng.choices(self.documents, self.weights)[0]
        greets = rng.random() < 0.04
        first = 0 if greets else rng.randrange(len(document.starts) - 1)
        answers = cut_passages(document, first, rng)
        if not answers:
            return self.write_chat(rng)
        messages = []
        if rng.random() < 0.3:
            system = SYSTEM[document.voice] if rng.random() < 0.75 else "You are a helpful assistant."
            messages.append({"role": "system", "content": system})
        for turn, answer in enumerate(answers):
            question = self.write_question(answer, document.voice, rng)
            second = find_sentences(answer)[1]
            if greets and not turn:
                question = rng.choice(GREETINGS)
            elif turn and rng.random() < 0.6:
                question = rng.choice(GO_ON)
            elif len(answer) - second > 120 and rng.random() < 0.12:
                question, answer = f"Continue: {answer[:second].rstrip()}", answer[second:]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self.template.render(messages=messages, bos_token=BOS)

    def write_question(self, passage: str, voice: str, rng: random.Random) -> str:
        """Returns a message that the passage may answer, about its rarest nouns that are not too rare to know."""
        found = {word for word in NOUN.findall(passage) if self.word_counts[word] >= 8}
        nouns, kind = sorted(found, key=lambda word: (self.word_counts[word], word)), rng.random()
        if kind < 0.15 or not nouns:
            return rng.choice(OPEN[voice])
        return rng.choice(ABOUT_TWO if kind < 0.35 and len(nouns) > 1 else ABOUT_ONE).format(*nouns)


def cut_passages(document: Document, first: int, rng: random.Random) -> list[str]:
    """Returns one or two consecutive passages of whole sentences from sentence `first` on; none where none fits."""
    turns = 2 if rng.random() < 0.2 else 1
    passages = []
    while len(passages) < turns:
        limit_chars = rng.uniform(170, 700) / turns + 60  # about 40 to 180 tokens in a single answer
        last = bisect.bisect_right(document.starts, document.starts[first] + limit_chars) - 1
        passage = document.text[document.starts[first] : document.starts[last]].strip()
        if len(passage) < 100:
            break
        passages.append(passage)
        first = last
    return passages
