"""An encoder and a decoder of BioGPT's layers; the decoder's attend to what the encoder makes of a source, too.

Same logits as `transformers.BlenderbotForConditionalGeneration` (modeling_blenderbot.py) for the same weights;
`model/blenderbot.py` maps them. With an output of cross attention that is 0, the decoder is BioGPT's.

Letters in tensor names: B batch, S positions of the source, T positions of the target, H hidden size, N heads, D head
size, V vocabulary.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import EVERYTHING, Segments, attend, both_ways
from model.blenderbot import copied_to_encoder, from_hf, hf_config, to_hf
from model.config import EncoderDecoderConfig
from model.decoder import DecoderLayer, LayeredModel, initialize
from model.loss import IGNORE_INDEX, linear_cross_entropy


class CrossAttention(nn.Module):
    """The projections of attention from the decoder to the source."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)


class CrossLayer(DecoderLayer):
    """A layer with cross attention between self-attention and feed-forward. Without a source it is a `DecoderLayer`."""

    def __init__(self, config: EncoderDecoderConfig, index: int) -> None:
        super().__init__(config, index)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.encoder_attn = CrossAttention(config.hidden_size)

    def skip(self, hidden_BTH: Tensor, *source: Tensor) -> Tensor:
        """The hidden states as they are. The encoder stays part of the graph, even if every layer is dropped.

        Otherwise ZeRO-3 would reuse the encoder's gradients of an earlier step.
        """
        return hidden_BTH + 0.0 * source[0][:, :1] if source else hidden_BTH

    def run(self, hidden_BTH: Tensor, segments: Segments, *source: Tensor) -> Tensor:
        """As `DecoderLayer.run`. source: what the encoder made of it, (B, S, H), and which of it is real, (B, S)."""
        hidden_BTH = self._self_attention(hidden_BTH, segments)
        return self._feed_forward(self._cross_attention(hidden_BTH, *source) if source else hidden_BTH)

    def _cross_attention(self, hidden_BTH: Tensor, source_BSH: Tensor, real_BS: Tensor) -> Tensor:
        heads, cross = self.config.num_attention_heads, self.encoder_attn
        query_BTH = self._product(cross.q_proj, self.encoder_attn_layer_norm, hidden_BTH)
        query_BTND = query_BTH.unflatten(2, (heads, -1))
        key_BSND, value_BSND = cross.kv_proj(source_BSH).unflatten(2, (2, heads, -1)).unbind(2)
        out_BTND = attend(query_BTND, key_BSND, value_BSND, both_ways(real_BS), self._attention_dropout())
        return hidden_BTH + self._dropout(cross.out_proj(out_BTND.flatten(2)))


class Stack(nn.Module):
    """The weights of one side: learned positions, layers and a last layer norm."""

    def __init__(self, config: EncoderDecoderConfig, layers: Iterable[DecoderLayer]) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.hidden_size)


class EncoderDecoder(LayeredModel):
    """Predicts a target from a source. Both read the same embedding, which is the head's weight too."""

    position_tables = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        # ZeRO-3 reduces the gradients of such a module after its first backward pass, and a shared layer has two.
        self.leaf_modules = () if config.share_layers else (DecoderLayer, CrossLayer)
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.encoder = self.new_encoder()
        self.decoder = Stack(config, (CrossLayer(config, index) for index in range(config.num_hidden_layers)))
        self.embed_scale = math.sqrt(config.hidden_size)
        initialize(self, config)

    def new_encoder(self) -> Any:
        """An encoder. LayerDrop draws by a layer's number, so its layers come after the decoder's."""
        config, first = self.config, self.config.num_hidden_layers
        own = 0 if config.share_layers else config.num_encoder_layers
        return Stack(config, (DecoderLayer(config, first + index) for index in range(own)))

    def forward(self, source_ids_BS: Tensor, labels_BT: Tensor, *, step: int = 0, micro_step: int = 0) -> Tensor:
        """The summed negative log-likelihood of the labels in nats, a scalar in fp32.

        Both are padded on the right: sources with `<pad>`, labels with -100, which does not count. The decoder reads
        the labels shifted by one (`shifted_right`). step, micro_step: the seeds of LayerDrop's draws.
        """
        real_BS, seeds = is_real(source_ids_BS, self.config.source_pad_token_id), (step, micro_step)
        source_BSH = self.encode(source_ids_BS, real_BS, *seeds)
        hidden_BTH = self.decode(self.shifted_right(labels_BT), source_BSH, real_BS, *seeds)
        weight, vocabulary = self.embed_tokens.weight, self.config.vocab_size
        return linear_cross_entropy(
            hidden_BTH.flatten(0, 1), weight, labels_BT.flatten(), vocabulary, compiled=self.compiled
        )

    def logits(self, source_ids_BS: Tensor, decoder_ids_BT: Tensor) -> Tensor:
        """The logits after each id that the decoder reads, (B, T, V). The first id of a target is `</s>`."""
        real_BS = is_real(source_ids_BS, self.config.source_pad_token_id)
        hidden_BTH = self.decode(decoder_ids_BT, self.encode(source_ids_BS, real_BS), real_BS)
        return F.linear(hidden_BTH, self.embed_tokens.weight[: self.config.vocab_size])

    def encode(self, source_ids_BS: Tensor, real_BS: Tensor, step: int = 0, micro_step: int = 0) -> Tensor:
        """What the encoder makes of a source, (B, S, H). real_BS: `is_real` of it."""
        layers = self.decoder.layers if self.config.share_layers else self.encoder.layers
        return self._run(self.encoder, layers, source_ids_BS, both_ways(real_BS), step, micro_step)

    def decode(self, ids_BT: Tensor, source_BSH: Tensor, real_BS: Tensor, step: int = 0, micro_step: int = 0) -> Tensor:
        """The hidden states that the head reads, (B, T, H), of the ids that the decoder reads."""
        return self._run(self.decoder, self.decoder.layers, ids_BT, EVERYTHING, step, micro_step, source_BSH, real_BS)

    def _run(
        self, stack: Stack, layers: nn.ModuleList, ids_BT: Tensor, segments: Segments, *seeds_and_source: Any
    ) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        hidden_BTH = self.embed_tokens(ids_BT) * self.embed_scale + stack.embed_positions(positions_T)
        hidden_BTH = F.dropout(hidden_BTH, self.config.hidden_dropout_prob, self.training)
        for layer in layers:
            hidden_BTH = layer(hidden_BTH, segments, *seeds_and_source)
        return stack.layer_norm(hidden_BTH)

    def shifted_right(self, labels_BT: Tensor) -> Tensor:
        """What the decoder reads to predict these labels: `</s>`, then the labels but the last; padding for -100."""
        first_B1 = torch.full_like(labels_BT[:, :1], self.config.eos_token_id)
        before_BT = torch.cat([first_B1, labels_BT[:, :-1]], 1)
        return before_BT.masked_fill(before_BT == IGNORE_INDEX, self.config.pad_token_id)

    def to_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Architecture.to_hf`. Layers that the encoder shares have the decoder's names alone."""
        return to_hf(tensors, self.config.vocab_size)

    def hf_weights(self) -> dict[str, Tensor]:
        """As `Architecture.hf_weights`: the encoder has copies of the layers that it shares."""
        weights = super().hf_weights()
        return {**copied_to_encoder(weights), **weights} if self.config.share_layers else weights

    def from_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Architecture.from_hf`. A causal decoder's weights go to both sides; the cross attention stays drawn."""
        return from_hf(tensors, dict(self.state_dict()), self.config)

    def hf_config(self) -> dict[str, Any]:
        """As `Architecture.hf_config`."""
        return hf_config(self.config)


def is_real(ids_BS: Tensor, pad_token_id: int) -> Tensor:
    """Which ids are not padding, (B, S). The first counts as real, so that a row of padding has something to see."""
    real_BS = ids_BS != pad_token_id
    real_BS[:, 0] = True
    return real_BS
