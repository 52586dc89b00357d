"""The engine: one model, many callers, one thread that computes."""

from .answer_stream import AnswerStream, AsyncAnswerStream
from .engine import Engine
from .request import Request, RequestState
from .scheduler import EngineStats
from .session import Session
from .tool_loop import run_tools
from .transcript import Message

__all__ = [
    "AnswerStream",
    "AsyncAnswerStream",
    "Engine",
    "EngineStats",
    "Message",
    "Request",
    "RequestState",
    "Session",
    "run_tools",
]
