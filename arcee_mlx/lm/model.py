"""The module mlx-lm finds as `mlx_lm.models.arcee`: the same decoder, with what mlx-lm's tools look for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear

from ..checkpoint.names import check_generates, map_names, tie_names
from ..checkpoint.quantization import read_quantization
from ..errors import InputError
from ..model.config import ArceeConfig
from ..model.decoder import ArceeForCausalLM
from ..model.relu2.down import ByNeuron, DownByNeuron


class ModelArgs(ArceeConfig):
    """ArceeConfig under the name mlx-lm expects."""

    model_type = "arcee"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config.json") -> ModelArgs:
        """As `ArceeConfig.from_dict`, both generations of JSON.

        A dict gets its `dtype` under the old name `torch_dtype`, too: mlx-lm hands the same dict to its convert
        command, which knows the old name only and would otherwise write what was computed in.
        """
        args = super().from_dict(values, source=source)
        if args.dtype is not None and isinstance(values, dict):
            values["torch_dtype"] = args.dtype
        return args  # type: ignore[return-value]


class Model(ArceeForCausalLM):
    """ArceeForCausalLM as mlx-lm makes, fills and calls one."""

    def __init__(self, args: ArceeConfig) -> None:
        check_generates(args)
        super().__init__(args)
        self.args = args
        self.model_type = "arcee"

    @property
    def make_cache(self) -> Any:
        """Hidden: mlx-lm calls it without max_kv_size where a model has it, and makes the same caches itself."""
        raise AttributeError("mlx_lm.models.cache.make_prompt_cache makes the caches of this model")

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Gives a checkpoint's tensors the model's names, as `arcee_mlx.load_model` does.

        Base prefixes are mapped, stale tensors left out, head and embedding tied exactly where transformers ties
        them. On MLX's CPU backend floats become float32: half-precision quantized products are wrong there.
        """
        names = map_names(weights, ArceeForCausalLM)
        tied = tie_names(names, self.args, lambda a, b: _same_bits(weights[a], weights[b]))
        if not tied and "lm_head" not in self:
            self.lm_head = nn.Linear(self.args.hidden_size, self.args.vocab_size, bias=False)
        arrays = {key: weights[name] for key, name in names.items()}
        if mx.default_device() == mx.cpu:
            floats = {key: x.astype(mx.float32) for key, x in arrays.items() if mx.issubdtype(x.dtype, mx.floating)}
            arrays |= floats
        self._quantize_by_neuron(arrays)
        return arrays

    def _quantize_by_neuron(self, weights: Mapping[str, mx.array]) -> None:
        """Quantizes what is stored by neuron and has no entry of its own: mlx-lm would look for its `weight`."""
        table = self.args.quantization or {}
        for i, layer in enumerate(self.layers):
            path, down = f"model.layers.{i}.mlp.down_proj", layer.mlp.down_proj
            if isinstance(down, DownByNeuron) and f"{path}.scales" in weights and path not in table:
                layer.mlp.update_modules({"down_proj": down.to_quantized(**asdict(read_quantization(table, path)))})

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Leaves this process its share of every layer: whole heads and neurons, for mlx-lm's tensor parallelism.

        Args:
            group: the processes; None takes all that were started together.

        Raises:
            InputError: the key/value heads cannot be shared out evenly.
        """
        group = group or mx.distributed.init()
        processes = group.size()
        if self.args.kv_heads % processes:
            raise InputError(
                f"{processes} processes for {self.args.kv_heads} key/value heads; expected a divisor of the heads"
            )
        for layer in self.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for block, name in ((attention, "q_proj"), (attention, "k_proj"), (attention, "v_proj"), (mlp, "up_proj")):
                setattr(block, name, shard_linear(getattr(block, name), "all-to-sharded", group=group))
            attention.o_proj = shard_linear(attention.o_proj, "sharded-to-all", group=group)
            if isinstance(mlp.down_proj, ByNeuron):
                mlp.down_proj.shard(group)
            else:
                mlp.down_proj = shard_linear(mlp.down_proj, "sharded-to-all", group=group)
            attention.num_heads //= processes
            attention.num_kv_heads //= processes


def _same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))
