"""BioGPT's causal decoder: pre-LN, learned positions with an offset of 2, scaled embeddings, erf GELU, tied head.

Letters in tensor names: B batch, T positions, H hidden size, N heads, D head size, V vocabulary.
Same logits as `transformers.BioGptForCausalLM` (modeling_biogpt.py) for the same weights; `model/hf.py` maps them.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import DecoderConfig

POSITION_OFFSET = 2  # position p reads row p + 2, fairseq's padding_idx + 1
PAD_ID = 1
IGNORED = -100


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with its layer norm in front and a residual around."""

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

    def forward(self, hidden_BTH: Tensor, step: int, micro_step: int) -> Tensor:
        # The choice is made in here and is the same on every rank: skipping a layer from outside lets ZeRO-3 reuse
        # its gradient of an earlier step, and ranks that differ wait for each other for ever.
        if self.training and is_dropped(
            self.config.layerdrop, self.config.layerdrop_seed, step, micro_step, self.index
        ):
            return hidden_BTH
        hidden_BTH = hidden_BTH + self._dropout(self._attention(self.self_attn_layer_norm(hidden_BTH)))
        inner = F.gelu(self.fc1(self.final_layer_norm(hidden_BTH)))
        inner = F.dropout(inner, self.config.activation_dropout, self.training)
        return hidden_BTH + self._dropout(self.fc2(inner))

    def _attention(self, hidden_BTH: Tensor) -> Tensor:
        batch, length, width = hidden_BTH.shape
        heads = self.config.num_attention_heads
        qkv_3BNTD = self.qkv_proj(hidden_BTH).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        out_BNTD = F.scaled_dot_product_attention(*qkv_3BNTD.unbind(0), dropout_p=dropout, is_causal=True)
        return self.out_proj(out_BNTD.transpose(1, 2).reshape(batch, length, width))

    def _dropout(self, hidden_BTH: Tensor) -> Tensor:
        return F.dropout(hidden_BTH, self.config.hidden_dropout_prob, self.training)


def is_dropped(probability: float, seed: int, step: int, micro_step: int, layer: int) -> bool:
    """LayerDrop's draw: a pure function of its arguments, so that all ranks and a resumed run agree."""
    return probability > 0 and random.Random(f"{seed} {step} {micro_step} {layer}").random() < probability


class Decoder(nn.Module):
    """The language model."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=PAD_ID)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.embed_scale = math.sqrt(config.hidden_size)
        initialize(self)

    def forward(
        self, input_ids_BT: Tensor, targets_BT: Tensor | None = None, *, step: int = 0, micro_step: int = 0
    ) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the summed negative log-likelihood in nats, a scalar in fp32.

        Targets of -100 do not count. Padding on the right needs no mask: attention is causal.
        step, micro_step: the global optimizer step and the micro-batch in it, from which layerdrop draws.
        """
        positions_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device) + POSITION_OFFSET
        hidden_BTH = self.embed_tokens(input_ids_BT) * self.embed_scale + self.embed_positions(positions_T)
        hidden_BTH = F.dropout(hidden_BTH, self.config.hidden_dropout_prob, self.training)
        for layer in self.layers:
            if self.config.gradient_checkpointing and self.training:
                hidden_BTH = checkpoint(layer, hidden_BTH, step, micro_step, use_reentrant=False)  # type: ignore
            else:
                hidden_BTH = layer(hidden_BTH, step, micro_step)
        logits_BTV = F.linear(self.layer_norm(hidden_BTH), self.embed_tokens.weight)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )


@torch.no_grad()
def initialize(decoder: Decoder) -> None:
    """Draw the weights from torch's global generator.

    "fairseq": transformer_lm of fairseq 0.12 (modules/multihead_attention.py, models/transformer). q, k and v are
    drawn as three matrices, as fairseq does when they have three sizes' shapes. "hf": N(0, 0.02), biases 0.
    """
    config = decoder.config
    if config.initialization == "hf":
        for module in decoder.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, 0.02)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
    else:
        width = config.hidden_size
        decoder.embed_tokens.weight.normal_(0.0, width**-0.5)
        decoder.embed_positions.weight.normal_(0.0, width**-0.5)
        decoder.embed_positions.weight[PAD_ID].zero_()
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            for projection in layer.qkv_proj.weight.split(width):
                nn.init.xavier_uniform_(projection, gain=1 / math.sqrt(2))
            nn.init.xavier_uniform_(layer.out_proj.weight)
            layer.out_proj.bias.zero_()
    decoder.embed_tokens.weight[PAD_ID].zero_()
