"""The engine: one model, many callers, one thread that computes."""

from .answer_stream import AnswerStream, AsyncAnswerStream
from .engine import Engine
from .request import Request, RequestState
from .scheduler import EngineStats

__all__ = ["AnswerStream", "AsyncAnswerStream", "Engine", "EngineStats", "Request", "RequestState"]
