"""Inspection: what was found out about a checkpoint. Its fields are the keys of `arcee-mlx inspect --json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..model.json_file import encode_special_floats

Level = Literal["error", "warning", "note"]
Topic = Literal["config", "rope", "weights", "tokenizer", "template", "generation", "files"]


@dataclass(frozen=True)
class Finding:
    """Something odd or missing.

    Attributes:
        level: "error" if the checkpoint does not load for it; "warning" if it computes or writes something else than one
            may think; "note" otherwise.
        topic: what it is about.
        text: one sentence for a person.
    """

    level: Level
    topic: Topic
    text: str


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much of the weights something is.

    Attributes:
        tensors: number in the files; a quantized layer has two or three.
        parameters: weights of the model; scales and biases of groups are none.
        size_bytes: of all the tensors.
    """

    tensors: int
    parameters: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits in the file for each weight, scales and biases of groups included."""
        return 8 * self.size_bytes / max(self.parameters, 1)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a checkpoint, as far as they can be read.

    Attributes:
        total: of all tensors that are read.
        parts: by what they are in the decoder: "embedding", "attention", "mlp", "norms", "head", "other".
        forms: by how a layer is stored, such as "BF16" or "4 bits in groups of 64".
        part_forms: the forms that occur in a part.
        dtypes: number of tensors by safetensors' dtype.
        files: the safetensors that are read.
    """

    total: Amount
    parts: Mapping[str, Amount]
    forms: Mapping[str, Amount]
    part_forms: Mapping[str, tuple[str, ...]]
    dtypes: Mapping[str, int]
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Context:
    """Positions and rotation.

    Attributes:
        tokens: positions a model has, stretched where its rope stretches itself.
        rope: `rope_type`, `rope_theta` and the options of the type, as they are computed with.
        attention_factor: what the rope multiplies cosines and sines with.
    """

    tokens: int
    rope: Mapping[str, Any]
    attention_factor: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """An estimate of what running needs, in bytes, without activations.

    Attributes:
        weights_bytes: as stored. MLX's CPU backend computes in float32 and needs more.
        kv_bytes_per_token: of a KV cache of 16-bit floats.
        full_context_bytes: weights and the cache of one sequence as long as the context.
    """

    weights_bytes: int
    kv_bytes_per_token: int
    full_context_bytes: int


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """The tokenizer.

    Attributes:
        kind: of algorithm, such as "BPE".
        vocab_size: number of ids, added tokens included.
        special_tokens: (text, id or None) by name, such as "bos_token".
        eos_tokens: texts by id of all that end an answer.
        chat_templates: their names; "default" is the usual one.
    """

    kind: str
    vocab_size: int
    special_tokens: Mapping[str, tuple[str, int | None]]
    eos_tokens: Mapping[int, str | None]
    chat_templates: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A file: what it is used for, None if it is not read."""

    size_bytes: int
    use: Literal["config", "weights", "tokenizer", "template", "document"] | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint is, and what is odd about it or missing.

    Attributes:
        name: the folder or hub id, as it was given.
        folder: where the files are; without the weights for a hub id.
        commit: full commit hash on the hub; None for a folder.
        findings: errors first, then warnings, then notes.
        config: config.json by its own keys, completed with defaults; as it is where it cannot be run, {} without one.
        weights: None where there are none that can be read.
        context: None where the config cannot be run.
        memory: None without config or weights.
        tokenizer: None where there is none that can be read.
        sampling: what generation does by default, by the names of GenerateOptions; {} where that cannot be said.
        files: by name.
    """

    name: str
    folder: str
    commit: str | None
    findings: tuple[Finding, ...]
    config: Mapping[str, Any]
    weights: Weights | None
    context: Context | None
    memory: Memory | None
    tokenizer: TokenizerFacts | None
    sampling: Mapping[str, Any]
    files: Mapping[str, FileFacts]

    @property
    def loads(self) -> bool:
        """Whether it can be loaded and computed with: no finding is an error.

        For a causal model that means `arcee_mlx.load`, tokenizer included; for a decoder without head `load_model`.
        """
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, `loads` and `bits_per_weight` included; infinities and NaN as transformers writes them."""
        values: dict[str, Any] = {"name": self.name, "loads": self.loads} | asdict(self)
        if self.weights is not None:
            stored = values["weights"]
            for amount in (stored["total"], *stored["parts"].values(), *stored["forms"].values()):
                amount["bits_per_weight"] = Amount(**amount).bits_per_weight
        plain: dict[str, Any] = encode_special_floats(values)
        return plain
