"""ArceeConfig: what config.json says, checked, with both generations of JSON read as transformers 5 reads them.

Source: transformers 5.23 `models/arcee/configuration_arcee.py`, `configuration_utils.py`, `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .json_file import decode_special_floats, encode_special_floats, shorten
from .json_file import read_json as read_json

ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "swish", "tanh",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")
_MAX_LABELS = 1_000_000  # each gets a name
LAYOUTS = ("standard", "by_neuron")
LAYOUT_VERSION = 1
_LEFT_OUT_BY_DEFAULT = (
    "architectures", "id2label", "label2id", "problem_type", "dtype", "quantization", "classifier_dropout",
    "hidden_dropout", "token_classification_bias", "output_hidden_states", "output_attentions",
)  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

_REQUIRED_ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
# What each kind computes with: numbers, and those that may be null. Other keys are not read, whatever they hold.
_ROPE_NUMBERS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor", "partial_rotary_factor"),
    "dynamic": ("rope_theta", "factor", "partial_rotary_factor"),
    "yarn": ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor"),
    "longrope": ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor"),
    "llama3": (
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        "partial_rotary_factor",
    ),
    "proportional": ("rope_theta", "factor", "partial_rotary_factor"),
}  # fmt: skip
_ROPE_NULLABLE = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}

# Keys of other decoders that change what is computed. Here they may only be absent or have a value that changes
# nothing: a model that was trained with one of them would be silently wrong without it.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None, 0),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None, 0),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None, 0),
    "is_causal": (None, True),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mup_width_multiplier": (None, 1),
    "no_rope_layer_interval": (None, 0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "qk_norm": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleave": (None, False),
    "rope_traditional": (None, False),
    "tie_last_hidden_states": (None, True),
    "use_parallel_residual": (None, False),
    "use_qk_norm": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class ArceeConfig:
    """A dense Arcee decoder, field for field as transformers' ArceeConfig, with transformers' defaults.

    Attributes:
        rope_parameters: `rope_type`, `rope_theta` and the options of that type, completed on construction
            (PyTorch's transformers 5 form; `from_dict` also reads `rope_scaling` and `rope_theta`).
        dtype: dtype the checkpoint was saved for: "float32", "float16", "bfloat16", or None when it does not say.
        id2label: class names of a classification head; None where the file has none (`num_labels` is then 2).
        classifier_dropout, hidden_dropout: of a token classifier in training: the first that is not None, else 0.1.
        token_classification_bias: whether a token classifier's head has one.
        quantization: MLX's quantization table as mlx-lm writes it (`group_size`, `bits`, `mode`, entries per layer).
        down_proj_layout: how down projections are stored: "standard", or "by_neuron" (transposed). In the file it is
            an object with a version, which is absent for the standard layout.

    Raises:
        ConfigError: a value is missing, has the wrong type, or describes a model transformers would refuse.
    """

    vocab_size: int = 32000
    hidden_size: int = 2560
    intermediate_size: int = 18432
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    dtype: str | None = None
    architectures: list[str] | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None
    token_classification_bias: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    quantization: dict[str, Any] | None = None
    down_proj_layout: str = "standard"
    source: str = field(default="ArceeConfig", repr=False, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        self._check_types()
        if self.num_key_value_heads is None:
            put("num_key_value_heads", self.num_attention_heads)
        if self.hidden_size % self.num_attention_heads:
            self._refuse(
                "hidden_size", self.hidden_size, f"a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim is None:
            put("head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.kv_heads:
            self._refuse(
                "num_attention_heads", self.num_attention_heads, f"a multiple of num_key_value_heads {self.kv_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            self._refuse("hidden_act", self.hidden_act, "one of " + ", ".join(ACTIVATIONS))
        if self.down_proj_layout not in LAYOUTS:
            self._refuse("down_proj_layout", self.down_proj_layout, " or ".join(LAYOUTS))
        if self.dtype is not None and self.dtype not in DTYPES:
            self._refuse("dtype", self.dtype, "one of " + ", ".join(DTYPES))
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            self._refuse("pad_token_id", self.pad_token_id, f"an id below vocab_size {self.vocab_size}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            self._refuse("problem_type", self.problem_type, "regression, or at least 2 labels in id2label")
        if self.id2label is not None and self.label2id is None:
            put("label2id", {name: i for i, name in self.id2label.items()})
        put("rope_parameters", self._complete_rope(dict(self.rope_parameters or {})))

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Width of one head (`head_dim`, never None)."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def rope(self) -> dict[str, Any]:
        """`rope_parameters`, never None."""
        assert self.rope_parameters is not None
        return self.rope_parameters

    @property
    def num_labels(self) -> int:
        """Number of classes of a classification head: the length of id2label, 2 without one."""
        return 2 if self.id2label is None else len(self.id2label)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config.json") -> ArceeConfig:
        """Reads the JSON of transformers 4 (`rope_scaling`, `rope_theta`, `torch_dtype`) or 5 (`rope_parameters`, `dtype`).

        Args:
            values: the parsed JSON object.
            source: what error messages call it, usually the file's path.

        Raises:
            ConfigError: as the class, and for a key of another decoder that would change the computation.
        """
        values = decode_special_floats(dict(values))
        if (model_type := values.get("model_type", "arcee")) != "arcee":
            raise ConfigError(
                f"{source}: model_type {shorten(model_type)}; expected 'arcee'; this package runs Arcee's dense decoder only, "
                f"try mlx-lm for other models"
            )
        _refuse_foreign_keys(values, source)
        known = {f.name for f in fields(cls)} - {"source"}
        kept = {key: value for key, value in values.items() if key in known}
        for key in ("output_hidden_states", "output_attentions", "use_cache"):
            kept[key] = bool(values[key]) if values.get(key) is not None else getattr(cls, key)
        kept["dtype"] = _dtype_name(values.get("dtype") or values.get("torch_dtype"))
        kept["rope_parameters"] = _merge_rope(values, source)
        # mlx-lm writes its table twice; older files may have the second only.
        kept["quantization"] = values.get("quantization") or values.get("quantization_config")
        kept["id2label"] = _read_labels(values, source)
        kept["down_proj_layout"] = _read_layout(values.get("down_proj_layout"), source)
        return cls(**kept, source=source)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json in transformers 5's form; `ArceeConfig.from_dict` reads it back unchanged."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "source"}
        for key in _LEFT_OUT_BY_DEFAULT:
            if values[key] == getattr(ArceeConfig, key):
                del values[key]
        values |= layout_entry(values.pop("down_proj_layout"))
        return encode_special_floats({"model_type": "arcee", **values})

    def _check_types(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            self._check_int(name, least=1)
        self._check_int("num_hidden_layers", least=0)
        for name in ("num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None:
                self._check_int(name, least=1)
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                self._check_int(name, least=-self.vocab_size)
        eos = self.eos_token_id
        if eos is not None and not all(_is_int(i) for i in (eos if isinstance(eos, list) else [eos])):
            self._refuse("eos_token_id", eos, "an integer or a list of integers")
        for name in ("initializer_range", "rms_norm_eps", "attention_dropout"):
            if not _is_number(getattr(self, name)):
                self._refuse(name, getattr(self, name), "a number")
        if not 0 < self.rms_norm_eps < math.inf:  # MLX's norm takes no other
            self._refuse("rms_norm_eps", self.rms_norm_eps, "a number above 0")
        if not isinstance(self.quantization, dict | None):
            self._refuse("quantization", self.quantization, "an object, as mlx-lm writes it")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias", "token_classification_bias"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, getattr(self, name), "true or false")
        names = self.architectures
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            self._refuse("architectures", names, "a list of names")
        if not isinstance(self.rope_parameters, Mapping | None):
            self._refuse("rope_parameters", self.rope_parameters, "an object")

    def _check_int(self, name: str, *, least: int) -> None:
        if not _is_int(value := getattr(self, name)) or value < least:
            self._refuse(name, value, f"an integer of at least {least}")

    def _complete_rope(self, rope: dict[str, Any]) -> dict[str, Any]:
        """Fills in what transformers fills in and checks what a rope type needs (PARITY of modeling_rope_utils)."""
        if "rope_type" not in rope:
            rope["rope_type"] = rope.get("type", "default")
        rope.setdefault("rope_theta", 10000.0)
        kind = rope["rope_type"]
        if kind not in ROPE_TYPES:
            self._refuse("rope_parameters.rope_type", kind, "one of " + ", ".join(ROPE_TYPES))
        if kind in ("yarn", "longrope", "llama3"):
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        for key in _REQUIRED_ROPE_KEYS.get(kind, ()):
            if key not in rope:
                self._refuse(f"rope_parameters.{key}", "nothing", f"a value, which rope type {kind!r} needs")
        for key in (*_ROPE_NUMBERS[kind], *_ROPE_NULLABLE.get(kind, ())):
            may_be_null = key in _ROPE_NULLABLE.get(kind, ()) and rope.get(key) is None
            if key in rope and not _is_number(rope[key]) and not may_be_null:
                self._refuse(f"rope_parameters.{key}", rope[key], "a number")
        for key in ("short_factor", "long_factor") if kind == "longrope" else ():
            if not isinstance(rope[key], list) or not all(_is_number(x) for x in rope[key]):
                self._refuse(f"rope_parameters.{key}", rope[key], "a list of numbers")
        if self.head_size % 2:
            self._refuse("head_dim", self.head_size, "an even number, which rotary embeddings need")
        return rope

    def _refuse(self, name: str, got: Any, want: str) -> None:
        raise ConfigError(f"{self.source}: {name} is {shorten(got)}; expected {want}; correct it in the config")


def read_config(folder: Path) -> ArceeConfig:
    """Reads `config.json` of a checkpoint folder.

    Raises:
        CheckpointError: the file is missing or not JSON.
        ConfigError: it does not describe an Arcee model this package runs exactly.
    """
    path = Path(folder) / "config.json"
    return ArceeConfig.from_dict(read_json(path), source=str(path))


def layout_entry(layout: str) -> dict[str, Any]:
    """What config.json holds of a layout of down projections: nothing for the standard one."""
    return {} if layout == "standard" else {"down_proj_layout": {"name": layout, "version": LAYOUT_VERSION}}


def _read_layout(entry: Any, source: str) -> str:
    if entry is None:
        return "standard"
    name, version = (entry.get("name"), entry.get("version")) if isinstance(entry, Mapping) else (entry, None)
    if name not in LAYOUTS or version != LAYOUT_VERSION:
        raise ConfigError(
            f"{source}: down_proj_layout is {entry!r}; expected {layout_entry('by_neuron')['down_proj_layout']}; upgrade "
            f"arcee_mlx if a newer one wrote this, or convert the original again with --layout standard"
        )
    return name


def _merge_rope(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{source}: rope_parameters is {shorten(rope)}; expected an object; correct it in the config")
    rope = dict(rope)
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    if values.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = "original_max_position_embeddings"
    if kind in ("yarn", "longrope", "llama3") and original in values and rope.get(original, 0) is not None:
        rope[original] = values[original]
    return rope


def _refuse_foreign_keys(values: Mapping[str, Any], source: str) -> None:
    for key, neutral in _NEUTRAL_VALUES.items():
        if key in values and values[key] not in neutral:
            raise ConfigError(
                f"{source}: {key} is {shorten(values[key])}; expected it absent or {neutral[-1]!r}: Arcee's decoder has no such "
                f"step and would compute something else; remove the key if the model was trained without it"
            )
    window, length = values.get("sliding_window"), values.get("max_position_embeddings", 4096)
    if window is not None and not (_is_int(window) and _is_int(length) and window >= length):
        raise ConfigError(
            f"{source}: sliding_window is {shorten(window)}; expected null: Arcee's attention is full; remove the key if the "
            f"model was trained without a window"
        )
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"{source}: layer_types has other kinds than 'full_attention'; expected full attention only")
    foreign = values.get("quantization_config")
    is_mlx = isinstance(foreign, dict) and (foreign.get("quant_method") is None or "quantization" in values)
    if foreign is not None and not is_mlx:
        raise ConfigError(
            f"{source}: quantization_config is {shorten(foreign)}; expected float weights or MLX quantization; "
            f"convert the original float checkpoint instead"
        )


def _read_labels(values: Mapping[str, Any], source: str) -> dict[int, str] | None:
    labels, count = values.get("id2label"), values.get("num_labels")
    if labels is not None:
        try:
            return {int(key): str(value) for key, value in labels.items()}
        except (AttributeError, ValueError) as error:
            raise ConfigError(
                f"{source}: id2label is {shorten(labels)}; expected an object from class numbers to names; correct it"
            ) from error
    if count is None:
        return None
    if not _is_int(count) or not 1 <= count <= _MAX_LABELS:
        raise ConfigError(f"{source}: num_labels is {count!r}; expected an integer from 1 to {_MAX_LABELS}; correct it")
    return {i: f"LABEL_{i}" for i in range(count)}


def _dtype_name(value: Any) -> str | None:
    return None if value is None else str(value).removeprefix("torch.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
