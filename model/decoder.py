"""BioGPT's causal decoder: pre-LN, learned positions with an offset of 2, scaled embeddings, erf GELU, tied head.

Letters in tensor names: B batch, T positions, H hidden size, N heads, D head size, V vocabulary.
Same logits as `transformers.BioGptForCausalLM` (modeling_biogpt.py) for the same weights; `model/hf.py` maps them.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.architecture import Architecture
from model.attention import (
    EVERYTHING,
    Segments,
    attend,
    kernel_name,
    segment_mask,
    segment_offsets,
    segment_positions,
    takes_offsets,
)
from model.config import DecoderConfig
from model.hf import hf_config, to_hf, weights_from_hf
from model.loss import linear_cross_entropy

POSITION_OFFSET = 2  # position p reads row p + 2: fairseq's padding_idx + 1


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with its layer norm in front and a residual around.

    What attention sees is the caller's choice, so encoders have the same layer.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.index = config, index
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, hidden_BTH: Tensor, segments: Segments, step: int, micro_step: int, *source: Tensor) -> Tensor:
        """source: what `run` of a subclass reads besides."""
        # The draw is made in here and is the same on every rank. Skipping a layer from outside would let ZeRO-3 reuse
        # its gradient of an earlier step, and ranks that disagree would wait for each other for ever.
        if self.training and is_dropped(
            self.config.layerdrop, self.config.layerdrop_seed, step, micro_step, self.index
        ):
            return self.skip(hidden_BTH, *source)
        if self._recomputes("full"):
            return checkpoint(self.run, hidden_BTH, segments, *source, use_reentrant=False)  # type: ignore[return-value]
        return self.run(hidden_BTH, segments, *source)

    def skip(self, hidden_BTH: Tensor, *source: Tensor) -> Tensor:
        """What a layer that is dropped gives."""
        return hidden_BTH

    def run(self, hidden_BTH: Tensor, segments: Segments, *source: Tensor) -> Tensor:
        """The layer itself. `LayeredModel.compile_layers` compiles this function."""
        return self._feed_forward(self._self_attention(hidden_BTH, segments))

    def _self_attention(self, hidden_BTH: Tensor, segments: Segments) -> Tensor:
        qkv_BTH3 = self._product(self.qkv_proj, self.self_attn_layer_norm, hidden_BTH)
        heads = (*hidden_BTH.shape[:2], 3, self.config.num_attention_heads, -1)
        query_BTND, key_BTND, value_BTND = qkv_BTH3.view(heads).unbind(2)
        out_BTND = attend(query_BTND, key_BTND, value_BTND, segments, self._attention_dropout())
        return hidden_BTH + self._dropout(self.out_proj(out_BTND.flatten(2)))

    def _feed_forward(self, hidden_BTH: Tensor) -> Tensor:
        inner = self._product(self.fc1, self.final_layer_norm, hidden_BTH)
        return hidden_BTH + self._dropout(self._product(self.fc2, self._activate, inner))

    def _attention_dropout(self) -> float:
        return self.config.attention_probs_dropout_prob if self.training else 0.0

    def _activate(self, inner: Tensor) -> Tensor:
        return F.dropout(F.gelu(inner), self.config.activation_dropout, self.training)

    def _dropout(self, hidden_BTH: Tensor) -> Tensor:
        return F.dropout(hidden_BTH, self.config.hidden_dropout_prob, self.training)

    def _product(self, linear: nn.Linear, cheap: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        """`linear(cheap(given))`. "selective" recomputes the input of the product and never the product itself.

        In eager mode the product must stand inside the checkpoint, or it would keep its input; recomputation stops
        early, once everything that was saved exists again. Compiled, everything inside a checkpoint is recomputed, so
        the product must stand outside.
        """
        if not self._recomputes("selective"):
            return linear(cheap(given))
        draws = self.config.activation_dropout > 0
        recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=draws)
        if torch.compiler.is_compiling():
            return linear(recomputed(cheap, given))
        return recomputed(lambda given: linear(cheap(given)), given)  # type: ignore[return-value]

    def _recomputes(self, what: str) -> bool:
        return self.config.gradient_checkpointing == what and self.training and torch.is_grad_enabled()


def is_dropped(probability: float, seed: int, step: int, micro_step: int, layer: int) -> bool:
    """Whether LayerDrop skips a layer: a pure function of its arguments, so all ranks and a resumed run agree."""
    return probability > 0 and random.Random(f"{seed} {step} {micro_step} {layer}").random() < probability


class LayeredModel(Architecture):
    """What all models share that are made of `DecoderLayer`s."""

    position_tables: ClassVar[tuple[str, ...]]
    """Names of the learned positions that `config.max_position_embeddings` sizes."""

    def compile_layers(self) -> None:
        """Compile each layer and the chunks of the loss with inductor, at their first use."""
        self.compiled = True
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.run = torch.compile(module.run, dynamic=False)

    def describe(self, device: torch.device, dtype: torch.dtype, context_length: int) -> str:
        """As `Architecture.describe`. The kernel is that of causal self-attention; in an encoder it has a mask."""
        return (
            f"{'compiled' if self.compiled else 'eager'},"
            f" attention {kernel_name(self.config, device, dtype, context_length)},"
            f" recomputation {self.config.gradient_checkpointing}"
        )

    def hidden_matrices(self) -> dict[str, int]:
        """As `Architecture.hidden_matrices`: q, k and v are stacked in one parameter, and so are k and v."""
        stacked = {"qkv_proj": 3, "kv_proj": 2}
        return {
            name: stacked.get(name.split(".")[-2], 1)
            for name, parameter in self.named_parameters()
            if parameter.dim() == 2 and ".layers." in f".{name}"
        }

    def with_positions(self, number: int) -> Self:
        """As `Architecture.with_positions`."""
        dropped = self.config.max_position_embeddings - number
        if dropped <= 0:
            return self
        state = self.state_dict()
        for name in self.position_tables:
            state[name] = state[name][:-dropped]
        shorter = type(self)(replace(self.config, max_position_embeddings=number))
        shorter.load_state_dict(state)
        return shorter.to(state[self.position_tables[0]].device).train(self.training)


class Decoder(LayeredModel):
    """The language model. Its embedding is padded while training; logits and exported weights are not."""

    leaf_modules = (DecoderLayer,)
    position_tables = ("embed_positions.weight",)

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.embed_scale = math.sqrt(config.hidden_size)
        initialize(self, config)
        if config.initialization == "fairseq":
            self.embed_positions.weight.data[config.pad_token_id].zero_()

    def to_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Architecture.to_hf`."""
        return to_hf(tensors, self.config.vocab_size)

    def from_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Architecture.from_hf`."""
        return weights_from_hf(tensors)

    def hf_config(self) -> dict[str, Any]:
        """As `Architecture.hf_config`."""
        return hf_config(self.config)

    def forward(
        self,
        input_ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        offsets_S: Tensor | None = None,
        *,
        step: int = 0,
        micro_step: int = 0,
    ) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the summed negative log-likelihood in nats, a scalar in fp32.

        Targets of -100 do not count. Padding on the right needs no mask: attention is causal.
        offsets_S: where the documents begin (`document_offsets`), if the caller knows: on a GPU the host would wait to
        find out. step, micro_step: the optimizer step and the micro-batch in it, the seeds of LayerDrop's draws.
        """
        config = self.config
        documents_BT = documents(input_ids_BT, config.eos_token_id) if config.boundaries == "document" else None
        hidden_BTH = self.hidden(input_ids_BT, documents_BT, offsets_S, step=step, micro_step=micro_step)
        weight, vocabulary = self.embed_tokens.weight, config.vocab_size
        if targets_BT is None:
            return F.linear(hidden_BTH, weight[:vocabulary])
        return linear_cross_entropy(
            hidden_BTH.flatten(0, 1), weight, targets_BT.flatten(), vocabulary, compiled=self.compiled
        )

    def hidden(
        self,
        input_ids_BT: Tensor,
        segments_BT: Tensor | None = None,
        offsets_S: Tensor | None = None,
        *,
        step: int = 0,
        micro_step: int = 0,
    ) -> Tensor:
        """The hidden states that the head reads, (B, T, H).

        segments_BT: attention stays inside a run of equal numbers, and positions start again at each run.
        offsets_S: `segment_offsets` of them, if the caller knows.
        """
        if segments_BT is None:
            positions, segments = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device), EVERYTHING
        else:
            positions, segments = segment_positions(segments_BT), self._segments(segments_BT, offsets_S)
        hidden_BTH = self.embed_tokens(input_ids_BT) * self.embed_scale
        hidden_BTH = hidden_BTH + self.embed_positions(positions + POSITION_OFFSET)
        hidden_BTH = F.dropout(hidden_BTH, self.config.hidden_dropout_prob, self.training)
        for layer in self.layers:
            hidden_BTH = layer(hidden_BTH, segments, step, micro_step)
        return self.layer_norm(hidden_BTH)

    def _segments(self, segments_BT: Tensor, offsets_S: Tensor | None) -> Segments:
        head_size = self.config.hidden_size // self.config.num_attention_heads
        if takes_offsets(segments_BT.device, self.embed_positions.weight.dtype, head_size):
            offsets_S = segment_offsets(segments_BT) if offsets_S is None else offsets_S
            torch._dynamo.mark_dynamic(offsets_S, 0)  # another number of documents does not recompile
            return Segments(None, offsets_S)
        return Segments(segment_mask(segments_BT), None)


def documents(input_ids_BT: Tensor, eos_token_id: int) -> Tensor:
    """The number of each token's document in its block, (B, T). `</s>` stands before the first token of a document."""
    return (input_ids_BT == eos_token_id).cumsum(1)


def document_offsets(input_ids_BT: Tensor, eos_token_id: int) -> Tensor:
    """Where each document begins in the B x T tokens, flattened, and B x T at the end: (S + 1,) int32."""
    return segment_offsets(documents(input_ids_BT, eos_token_id))


@torch.no_grad()
def initialize(model: nn.Module, config: DecoderConfig) -> None:
    """Draw the weights of a model with the embedding `embed_tokens` from torch's global generator.

    "fairseq": transformer_lm of fairseq 0.12 (modules/multihead_attention.py, models/transformer). q, k and v are
    drawn as three separate matrices, so that each has the Xavier bound of its own shape. "hf": N(0, 0.02), biases 0.
    The rows that pad the vocabulary are zero.
    """
    width, embeddings = config.hidden_size, dict(model.named_parameters())["embed_tokens.weight"]
    for name, module in model.named_modules():
        if config.initialization == "hf" and isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, 0.02)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        elif config.initialization == "fairseq" and isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, width**-0.5)
        elif config.initialization == "fairseq" and isinstance(module, nn.Linear):
            if name.endswith(("q_proj", "qkv_proj", "kv_proj")):
                for projection in module.weight.split(width):
                    nn.init.xavier_uniform_(projection, gain=1 / math.sqrt(2))
            elif name.endswith("out_proj"):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
    embeddings[config.pad_token_id].zero_()
    embeddings[config.vocab_size :].zero_()
