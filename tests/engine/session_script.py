"""What the tests of sessions share: scripted answers that note their prompt, and short ways to send and look."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from arcee_mlx import GenerateOptions, Session, Tokenizer

GREEDY = GenerateOptions(max_tokens=12, temp=0)
SEEDED = GenerateOptions(max_tokens=12, temp=0.9, seed=5)


class Script:
    """A logits processor that has the model say certain tokens, and notes the prompt that it saw."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids
        self.prompt: list[int] = []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.prompt = self.prompt or tokens.tolist()
        place = tokens.size - len(self.prompt)
        if place >= len(self.ids):
            return logits
        said = mx.full(logits.shape, -1e9)
        said[:, self.ids[place]] = 0
        return said


def read(chunks: Any) -> list[int]:
    return [chunk.token for chunk in chunks]


def render(tokenizer: Tokenizer, session: Session, text: str) -> str:
    messages = [vars(message) for message in session.messages]
    return tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}], add_generation_prompt=True)


def contents(session: Session) -> list[str]:
    return [message.content for message in session.messages]


def send_all(session: Session, *texts: str) -> list[list[int]]:
    return [read(session.send(text)) for text in texts]
