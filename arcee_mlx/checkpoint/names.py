"""Which of a file's tensors is which of a model's: the classes by name, prefixes mapped, heads, and their tie."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..errors import ConfigError, InputError
from ..model.config import ArceeConfig
from ..model.decoder import ArceeForCausalLM, ArceeModel
from ..model.heads import ArceeForQuestionAnswering, ArceeForSequenceClassification, ArceeForTokenClassification

Model = (
    ArceeForCausalLM
    | ArceeModel
    | ArceeForSequenceClassification
    | ArceeForTokenClassification
    | ArceeForQuestionAnswering
)


class Layout(NamedTuple):
    """Where a class keeps its decoder and its head.

    Attributes:
        prefix: of the decoder's keys.
        head: the first part of its head's keys; "" for none.
    """

    prefix: str
    head: str


LAYOUTS: dict[type[Model], Layout] = {
    ArceeForCausalLM: Layout("model.", "lm_head"),
    ArceeModel: Layout("", ""),
    ArceeForSequenceClassification: Layout("model.", "score"),
    ArceeForTokenClassification: Layout("model.", "score"),
    ArceeForQuestionAnswering: Layout("transformer.", "qa_outputs"),
}
CLASSES = {cls.__name__: cls for cls in LAYOUTS}
TASK_HEADS = ("score", "qa_outputs")
PREFIXES = ("model.", "transformer.")
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def layout_of(model_class: type[Any]) -> Layout:
    """The layout of a class, or of one made from it."""
    return next(layout for cls, layout in LAYOUTS.items() if issubclass(model_class, cls))


def decoder_of(model: Model) -> ArceeModel:
    """The decoder inside a model."""
    prefix = layout_of(type(model)).prefix
    return getattr(model, prefix.removesuffix(".")) if prefix else model  # type: ignore[return-value]


def choose_class(config: ArceeConfig, asked: type[Any] | None = None) -> type[Model]:
    """The class to load a checkpoint as: the one asked for, else the one that config.json names.

    Raises:
        ConfigError, InputError: see `load_model`.
    """
    if asked is not None:
        if asked not in LAYOUTS:
            raise InputError(f"model_class is {asked!r}; expected one of {', '.join(CLASSES)}")
        return asked
    named = named_class(config) or "ArceeForCausalLM"
    if named not in CLASSES:
        raise ConfigError(
            f"{config.source}: architectures names {named!r}; expected one of {', '.join(CLASSES)}; pass model_class to "
            f"load the decoder of this checkpoint"
        )
    return CLASSES[named]


def named_class(config: ArceeConfig) -> str | None:
    """The class that config.json says the checkpoint is of."""
    return config.architectures[0] if config.architectures else None


def check_generates(config: ArceeConfig) -> None:
    """Stops at the checkpoint of a classifier: made into a causal model it would write nonsense, or lose its head.

    Raises:
        ConfigError: naming its class.
    """
    named = named_class(config)
    if named in CLASSES and LAYOUTS[CLASSES[named]].head in TASK_HEADS:
        raise ConfigError(
            f"{config.source}: architectures names {named!r}, which generates no text; expected 'ArceeForCausalLM'; load it "
            f"with arcee_mlx.load_model and call its forward"
        )


def find_prefix(names: Iterable[str]) -> str:
    """The prefix that a decoder's tensors have; "" for none."""
    begun = {name.split(".")[0] + "." for name in names}
    return next((prefix for prefix in PREFIXES if prefix in begun), "")


def is_causal(names: Iterable[str]) -> bool:
    """Whether the keys of a model are a causal model's, with a tied head or its own."""
    kept = list(names)
    return find_prefix(kept) == "model." and not any(name.split(".")[0] in TASK_HEADS for name in kept)


def strip_prefix(name: str) -> str:
    """The name that a tensor or a layer has in a decoder without head."""
    return name.removeprefix(find_prefix([name]))


def map_names(names: Iterable[str], chosen: type[Model], named: str | None = None) -> dict[str, str]:
    """The model's key -> the file's: prefixes mapped, stale tensors left out by name, and the head of another class.

    Args:
        names: of the file's tensors.
        chosen: the class to load it as.
        named: the class that config.json names, None for a causal model: a checkpoint has no head but its own class's,
            and what it has besides stays, to be refused.
    """
    prefix, head = layout_of(chosen)
    heads = {_HEAD, *TASK_HEADS}
    left_out = heads - {head} if chosen is ArceeModel or chosen.__name__ != (named or "ArceeForCausalLM") else set()
    kept = [n for n in names if not n.endswith("rotary_emb.inv_freq") and n.split(".")[0] not in left_out]
    given = find_prefix(kept)

    def rename(name: str) -> str:
        if not name.startswith(given) or name.split(".")[0] in heads:
            return name
        return prefix + name.removeprefix(given)

    return {rename(name): name for name in kept}


def tie_names(names: dict[str, str], config: ArceeConfig, same: Callable[[str, str], bool]) -> bool:
    """Decides whether head and embedding are one, as transformers does, and leaves one of them in `names`.

    Args:
        names: from `map_names`; changed in place.
        same: whether two tensors of the file, by the file's keys, are equal to the bit.
    """
    embedding = {key for key in names if key.startswith(_EMBEDDING + ".")}
    head = {key for key in names if key.startswith(_HEAD + ".")}
    if not config.tie_word_embeddings:
        return False
    if embedding and head:
        pairs = [(key, key.replace(_EMBEDDING, _HEAD)) for key in embedding]
        if len(embedding) != len(head) or not all(
            other in names and same(names[key], names[other]) for key, other in pairs
        ):
            return False
        for key in head:
            del names[key]
    for key in head - embedding if not embedding else ():
        names[key.replace(_HEAD, _EMBEDDING)] = names.pop(key)
    return True
