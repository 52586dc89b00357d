"""Text in, plain results out: what a model makes of whole texts, many at a time."""

from .embed import Pooling, embed
from .score import TextScore, TokenScore, score

__all__ = ["Pooling", "TextScore", "TokenScore", "embed", "score"]
