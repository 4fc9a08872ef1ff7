"""What every trained model offers to the engine, the checkpoints and the export. They know no model by name."""

from typing import Any, Self

import torch
from torch import Tensor, nn


class Architecture(nn.Module):
    """A model that can be trained.

    `forward` takes the tensors of a batch and, by name, `step` and `micro_step`, the seeds of draws that all ranks must
    make alike. With targets it returns their summed loss, a scalar in fp32.

    `config` is a frozen dataclass of the model's shape. It is recorded in every checkpoint, and it has
    `parameter_count()` and `flops_per_token(context_length)`.
    """

    leaf_modules: tuple[type[nn.Module], ...]
    """Modules that decide inside whether they run: ZeRO-3 must gather and count each of them as a whole."""
    config: Any
    compiled = False

    def compile_layers(self) -> None:
        """Compile the model's layers and its loss at their first use."""
        raise NotImplementedError

    def describe(self, device: torch.device, dtype: torch.dtype, context_length: int) -> str:
        """How the model computes a training step: compiled or eager, the attention kernel, the recomputation."""
        raise NotImplementedError

    def hidden_matrices(self) -> dict[str, int]:
        """The parameters that are weights of hidden linear maps: name -> how many matrices are stacked in its rows."""
        raise NotImplementedError

    def to_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by our parameter names -> by transformers' names, unpadded; each a contiguous part of one of ours."""
        raise NotImplementedError

    def hf_weights(self) -> dict[str, Tensor]:
        """All tensors that transformers loads, by its names."""
        return self.to_hf(dict(self.state_dict()))

    def from_hf(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the names of transformers or fairseq -> a state dict by ours. Raises ValueError."""
        raise NotImplementedError

    def with_positions(self, number: int) -> Self:
        """A model of the first positions only: those after them were never trained. Itself if it has no more."""
        raise NotImplementedError

    def hf_config(self) -> dict[str, Any]:
        """The content of transformers' `config.json` for this model."""
        raise NotImplementedError
