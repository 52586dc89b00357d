"""What can go wrong, by kind. Every message reads `<what> <got>; expected <want>; <what to do>`."""

from __future__ import annotations


class ArceeError(Exception):
    """The base of every error this package raises on purpose."""


class ConfigError(ArceeError, ValueError):
    """A config.json, or a value meant for one, that does not describe a model this package can run exactly."""


class CheckpointError(ArceeError):
    """A checkpoint folder whose files are missing, damaged, or not what config.json says."""


class TokenizerError(ArceeError):
    """A tokenizer or chat template that cannot be read or rendered."""


class HubError(ArceeError):
    """A Hugging Face Hub id that could not be turned into local files, or that a folder could not be uploaded to."""


class InputError(ArceeError, ValueError):
    """An argument of the caller's that is out of range or does not fit the model."""


class GrammarError(InputError):
    """A schema, regular expression or grammar that cannot be enforced; the message names what cannot."""


class IncompleteAnswerError(ArceeError):
    """An answer that was cut off before it was all that its schema, expression or grammar asks for.

    Attributes:
        text: what was made of it.
    """

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text

    def __reduce__(self) -> tuple[type[IncompleteAnswerError], tuple[str, str]]:
        return type(self), (str(self), self.text)


class ContextOverflowError(InputError):
    """A session's next prompt has more tokens than the model has positions; the message gives the numbers."""


class ConversionError(ArceeError):
    """A conversion that cannot start or did not finish; the message says what was kept."""


class CallbackError(ArceeError):
    """A function the caller passed in raised, or returned what it must not; what it raised is the cause."""


class EngineClosedError(ArceeError):
    """A call to an engine that is closed, was closed meanwhile, or belongs to another process."""


class QueueFullError(ArceeError):
    """An engine has as many requests waiting as it takes; the caller may try again later."""


class MemoryBudgetError(ArceeError):
    """A request that does not fit the memory budget; the message gives the numbers and what would fit."""


class DeviceError(ArceeError):
    """The device, or MLX on it, failed while it computed; what it said is the cause."""
