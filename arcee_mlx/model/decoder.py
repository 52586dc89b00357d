"""Arcee's decoder: ArceeModel and ArceeForCausalLM, whose attribute names are the checkpoint's keys.

Dimension letters, here and in shapes everywhere: B rows, L new tokens, S keys in all (cache + L), H query heads,
K key/value heads, D head_dim, E hidden_size, F intermediate_size, V vocab_size.

Two conventions, one computation: `model(input_ids, cache)` is mlx-lm's, stateless and never waiting for the device;
`model.forward(...)` is transformers', with its masks, outputs, losses and the state of its `dynamic` rope.

Source: transformers 5.23 `models/arcee/modeling_arcee.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import upstream
from ..errors import InputError
from .activations import ACTIVATIONS, relu2
from .config import ArceeConfig
from .inputs import Embedded, embed, keep_rows, read_inputs, read_positions
from .linear import project
from .losses import causal_loss
from .masks import Mask, attention_mask_4d, causal_mask, packed_mask
from .open_attention import attend_openly
from .relu2.down import DownByNeuron
from .rope import RotaryEmbedding, Rotation, rotate
from .training import Trainable, draw_key, recompute


@dataclass(frozen=True)
class BaseModelOutput:
    """What `ArceeModel.forward` gives, under transformers' names.

    Attributes:
        last_hidden_state: (B, L, E) after the final norm.
        past_key_values: the cache the call filled, a list with one entry a layer, or None.
        hidden_states: layers + 1 arrays (B, L, E), [0] the embeddings, [-1] after the final norm; an entry that was
            not asked for is None. None when not asked for at all.
        attentions: per layer (B, H, L, S), or None.
    """

    last_hidden_state: mx.array
    past_key_values: list[Any] | None = None
    hidden_states: tuple[mx.array | None, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass(frozen=True)
class CausalLMOutput(BaseModelOutput):
    """What `ArceeForCausalLM.forward` gives: BaseModelOutput plus logits (B, kept rows, V) and a float32 scalar loss."""

    logits: mx.array = None  # type: ignore[assignment]
    loss: mx.array | None = None


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: ArceeConfig) -> None:
        super().__init__()
        E, H, K, D = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size
        self.num_heads, self.num_kv_heads, self.scale = H, K, D**-0.5
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(E, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(E, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(E, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, E, bias=config.attention_bias)

    def __call__(
        self,
        x: mx.array,
        rotation: Rotation,
        mask: Mask,
        cache: Any | None,
        *,
        weights: bool = False,
        key: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        B, L, _ = x.shape
        queries = rotate(project(self.q_proj, x).reshape(B, L, self.num_heads, -1), rotation).transpose(0, 2, 1, 3)
        keys = rotate(project(self.k_proj, x).reshape(B, L, self.num_kv_heads, -1), rotation).transpose(0, 2, 1, 3)
        values = project(self.v_proj, x).reshape(B, L, self.num_kv_heads, -1).transpose(0, 2, 1, 3)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        probabilities = None
        dropout = self.dropout if self.training else 0.0
        if weights or dropout:
            out, probabilities = attend_openly(queries, keys, values, mask, scale=self.scale, dropout=dropout, key=key)
        elif cache is not None and hasattr(cache, "bits"):  # a quantized cache holds (codes, scales, biases)
            attend = upstream.mlx_lm_module("models.base").scaled_dot_product_attention
            out = attend(queries, keys, values, cache=cache, scale=self.scale, mask=mask.hidden)
        else:
            out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask.hidden)
        if mask.sees is not None and probabilities is None:
            out = mx.where(mask.sees, out, 0)
        return project(self.o_proj, out.transpose(0, 2, 1, 3).reshape(B, L, -1)), probabilities


class MLP(nn.Module):
    """down(act(up(x))): ungated, with Arcee's squared ReLU unless the config names another activation."""

    def __init__(self, config: ArceeConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        down = DownByNeuron if config.down_proj_layout == "by_neuron" else nn.Linear
        self.down_proj = down(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """(..., E) -> (..., E), added to `residual` where there is one."""
        x = project(self.up_proj, x)
        if self.act_fn is relu2 and hasattr(self.down_proj, "after_relu2"):
            return self.down_proj.after_relu2(x, residual)
        x = project(self.down_proj, self.act_fn(x))
        return x if residual is None else residual + x


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the stream. `mx.fast.rms_norm` casts before the weight, as Arcee's."""

    gradient_checkpointing = False

    def __init__(self, config: ArceeConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, rotation: Rotation, mask: Mask, cache: Any | None, *, weights: bool = False
    ) -> tuple[mx.array, mx.array | None]:
        key = draw_key() if self.training and self.self_attn.dropout else None
        if self.gradient_checkpointing and self.training and cache is None:
            return recompute(self, lambda x: self._compute(x, rotation, mask, None, weights, key), x)
        return self._compute(x, rotation, mask, cache, weights, key)

    def _compute(
        self, x: mx.array, rotation: Rotation, mask: Mask, cache: Any | None, weights: bool, key: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        normed = self.input_layernorm(x)
        attended, probabilities = self.self_attn(normed, rotation, mask, cache, weights=weights, key=key)
        x = x + attended
        return self.mlp(self.post_attention_layernorm(x), x), probabilities


class ArceeModel(Trainable):
    """The decoder without a head."""

    def __init__(self, config: ArceeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def __call__(
        self, input_ids: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """mlx-lm's convention: (B, L) ids, or embeddings (B, L, E) instead -> (B, L, E) after the final norm.

        Positions continue from the cache; length-dependent rope uses the table of each row's own length. Ids are not
        checked here, since that would wait for the device: callers check them where they come in.
        """
        h = input_embeddings
        if h is None:
            h = embed(input_ids, self.embed_tokens, self.config) if self.training else self.embed_tokens(input_ids)
        L = h.shape[1]
        first = cache[0] if cache else None
        mask = causal_mask(L, first)
        offset = 0 if first is None else first.offset
        if isinstance(offset, int):
            positions = mx.arange(offset, offset + L)[None]
        else:  # one offset a row, in batches
            positions = offset[:, None] + mx.arange(L)[None]
        rotation = self.rotary_emb.rotation(positions, self.rotary_emb.table(offset + L), h.dtype)
        for layer, layer_cache in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            h, _ = layer(h, rotation, mask, layer_cache)
        return self.norm(h)

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """mlx-lm KV caches, one a layer: growing, or rotating over the first 4 and the newest `max_kv_size` tokens."""
        caches = upstream.mlx_lm_module("models.cache")
        if max_kv_size is not None:
            return [caches.RotatingKVCache(max_size=max_kv_size, keep=4) for _ in self.layers]
        return [caches.KVCache() for _ in self.layers]

    def forward(
        self,
        input_ids: mx.array | None = None,
        *,
        attention_mask: mx.array | None = None,
        position_ids: mx.array | None = None,
        inputs_embeds: mx.array | None = None,
        cache: list[Any] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Computes what transformers' ArceeModel.forward computes.

        Args:
            input_ids: int (B, L); exactly one of input_ids and inputs_embeds.
            attention_mask: (B, tokens so far), nonzero = visible; or 4-D bool or additive, used as it is.
            position_ids: int (B or 1, L); by default they continue from the cache, with left padding too.
                Without mask and cache, a step other than +1 starts a new sequence (block-diagonal attention).
            inputs_embeds: float (B, L, E).
            cache: from `make_cache`, filled in place. (transformers calls it past_key_values.)
            use_cache: True makes a cache when none is given. None takes the config's word for how masks and positions
                are read, but makes no cache; False is no cache at all.
            output_hidden_states: True, or the indices of those to give (negative from the end).
            output_attentions: give the attention probabilities; not with a quantized cache.

        Raises:
            InputError: an argument does not fit the model or another argument.
        """
        embedded = read_inputs(input_ids, inputs_embeds, self.embed_tokens, self.config)
        return self._forward(
            embedded, attention_mask, position_ids, cache, use_cache, output_hidden_states, output_attentions
        )

    def _forward(
        self,
        embedded: Embedded,
        attention_mask: mx.array | None,
        position_ids: mx.array | None,
        cache: list[Any] | None,
        use_cache: bool | None,
        output_hidden_states: bool | int | Sequence[int] | None,
        output_attentions: bool | None,
    ) -> BaseModelOutput:
        h, B, L = embedded
        if cache is None and use_cache:
            cache = self.make_cache()
        if cache is not None and len(cache) != len(self.layers):
            raise InputError(f"cache has {len(cache)} entries; expected one for each of the {len(self.layers)} layers")
        has_cache = cache is not None or (self.config.use_cache if use_cache is None else use_cache)
        first = cache[0] if cache else None
        offset = 0 if first is None else first.offset
        positions, length = read_positions(position_ids, B, L, offset)
        rotation = self.rotary_emb.rotation(positions, self._forward_table(positions, length), h.dtype)
        if attention_mask is not None:
            if first is not None and (not isinstance(offset, int) or hasattr(first, "max_size")):
                raise InputError(
                    f"attention_mask with a {type(first).__name__}; expected a cache of make_cache() without max_kv_size"
                )
            H = self.config.num_attention_heads
            mask = attention_mask_4d(mx.array(attention_mask), B, H, L, offset, h.dtype, has_cache=has_cache)
        elif position_ids is not None and not has_cache:
            mask = packed_mask(positions)
        else:
            mask = causal_mask(L, first)
        wanted = self._wanted_states(output_hidden_states)
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        states: list[mx.array | None] = [h if 0 in wanted else None]
        attentions: list[mx.array] = []
        for i, (layer, layer_cache) in enumerate(
            zip(self.layers, cache or [None] * len(self.layers), strict=True), start=1
        ):
            h, probabilities = layer(h, rotation, mask, layer_cache, weights=weights)
            states.append(h if i in wanted else None)
            if weights and probabilities is not None:
                attentions.append(probabilities)
        h = self.norm(h)
        if len(self.layers) in wanted:
            states[-1] = h
        return BaseModelOutput(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=tuple(states) if wanted else None,
            attentions=tuple(attentions) if weights else None,
        )

    def _forward_table(self, positions: mx.array, length: int | None) -> mx.array:
        if length is None:  # known only by looking at the positions, which waits for the device
            length = int(positions.max()) + 1 if self.rotary_emb.depends_on_length else 0
        return self.rotary_emb.forward_table(length)

    def _wanted_states(self, asked: bool | int | Sequence[int] | None) -> frozenset[int]:
        asked = self.config.output_hidden_states if asked is None else asked
        count = len(self.layers) + 1
        if isinstance(asked, bool):
            return frozenset(range(count)) if asked else frozenset()
        if asked == 0:  # transformers takes a single 0 for "none"
            return frozenset()
        indices = [asked] if isinstance(asked, int) else list(asked)
        return frozenset(i % count for i in indices if -count <= i < count)


class ArceeForCausalLM(Trainable):
    """The decoder with its language-model head, tied to the embedding or not.

    `tied` overrides `tie_word_embeddings`: a file that holds a different head is not tied, as in transformers.
    """

    def __init__(self, config: ArceeConfig, *, tied: bool | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = ArceeModel(config)
        if not (config.tie_word_embeddings if tied is None else tied):
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, where mlx-lm looks for them."""
        return self.model.layers

    def __call__(
        self, input_ids: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """mlx-lm's convention: ids (B, L) -> logits (B, L, V); see `ArceeModel.__call__`."""
        return self.logits(self.model(input_ids, cache, input_embeddings))

    def logits(self, hidden_states: mx.array) -> mx.array:
        """The head: (..., E) -> (..., V)."""
        return project(self.lm_head if "lm_head" in self else self.model.embed_tokens, hidden_states)

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """See `ArceeModel.make_cache`."""
        return self.model.make_cache(max_kv_size)

    def forward(
        self,
        input_ids: mx.array | None = None,
        *,
        attention_mask: mx.array | None = None,
        position_ids: mx.array | None = None,
        inputs_embeds: mx.array | None = None,
        cache: list[Any] | None = None,
        use_cache: bool | None = None,
        labels: mx.array | None = None,
        shift_labels: mx.array | None = None,
        num_items_in_batch: int | mx.array | None = None,
        ignore_index: int = -100,
        logits_to_keep: int | mx.array = 0,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutput:
        """Computes what transformers' ArceeForCausalLM.forward computes; see `ArceeModel.forward` for the first half.

        Args:
            labels: int (B, L), shifted inside so that position i is compared with label i + 1.
            shift_labels: int, as many as logits rows, compared unshifted, instead of `labels`.
            num_items_in_batch: the loss is the sum over it instead of the mean.
            ignore_index: label that does not count; a batch of nothing else gives NaN, as in torch.
            logits_to_keep: last n rows (0 = all), int indices (n,) for all rows or (B, n) a row, or a bool mask
                (B, L), which gives logits (n, V).

        Raises:
            InputError: an argument does not fit the model or another argument.
        """
        base = self.model.forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = self.logits(keep_rows(base.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_loss(
                logits,
                labels,
                shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
            )
        return CausalLMOutput(
            last_hidden_state=base.last_hidden_state,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            logits=logits,
            loss=loss,
        )
