"""A small vector quantiser of pictures: a convolutional VQ-VAE (van den Oord et al., 2017, arXiv:1711.00937).

The encoder turns each patch of a picture into a vector, and the vector becomes the number of the nearest one in the
codebook. The decoder draws the picture from these numbers. The codebook starts from k-means and then follows the
vectors by exponential moving averages (the paper's appendix A.1).

Letters: N pictures, S pixels of a side, P patches of a picture, M vectors, D numbers of a vector, C codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

DECAY = 0.98  # of the moving averages, each step
COMMITMENT = 0.25  # the paper's beta
LEARNING_RATE = 3e-3
BATCH = 64  # pictures a step
START = 1024  # pictures whose vectors k-means groups
WARM_UP = 0.2  # share of the steps before there is a codebook, so that k-means finds vectors that mean something
LEAST_USE = 0.05  # a code that fewer vectors of a step use, on average, takes over one of them


@dataclass(frozen=True)
class QuantizerConfig:
    """The shape of a quantiser."""

    side: int = 32
    """Pixels of a picture's side."""
    patch: int = 8
    """Pixels of a patch's side. Each patch has one code."""
    codes: int = 256
    """Size of the codebook."""
    width: int = 64
    """Channels between the two convolutions of the encoder, and of the decoder."""
    vector: int = 16
    """Numbers of a code's vector."""


class Quantizer(nn.Module):
    """Pictures (N, 3, S, S) of values from 0 to 255 <-> codes (N, P) int64, row by row."""

    codebook_CD: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config, patch = config, config.patch
        self.encoder = nn.Sequential(
            nn.Conv2d(3, config.width, patch, patch), nn.ReLU(), nn.Conv2d(config.width, config.vector, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.vector, config.width, 1), nn.ReLU(), nn.ConvTranspose2d(config.width, 3, patch, patch)
        )
        self.register_buffer("codebook_CD", torch.zeros(config.codes, config.vector))

    def vectors(self, pictures: Tensor) -> Tensor:
        """The vectors of the patches before they become codes, (N, P, D)."""
        return self.encoder(_scaled(pictures)).flatten(2).transpose(1, 2)

    def draw(self, vectors_NPD: Tensor) -> Tensor:
        """The pictures that the decoder draws from vectors, with values from -1 to 1."""
        side = self.config.side // self.config.patch
        return self.decoder(vectors_NPD.transpose(1, 2).unflatten(2, (side, side)))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """The codes of pictures."""
        return nearest(self.vectors(pictures).flatten(0, 1), self.codebook_CD).view(len(pictures), -1)

    @torch.no_grad()
    def decode(self, codes_NP: Tensor) -> Tensor:
        """The pictures that codes stand for, float32."""
        return ((self.draw(self.codebook_CD[codes_NP]) + 1) * 127.5).clamp(0, 255)


def _scaled(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


def nearest(vectors_MD: Tensor, codebook_CD: Tensor) -> Tensor:
    """The number of the codebook's vector that is nearest to each vector, (M,)."""
    return ((codebook_CD**2).sum(1) - 2 * vectors_MD @ codebook_CD.T).argmin(1)


def fit(config: QuantizerConfig, pictures: Tensor, steps: int, seed: int) -> Quantizer:
    """A quantiser trained on pictures (N, 3, S, S) uint8. The same arguments give the same weights."""
    torch.manual_seed(seed)
    quantizer, codebook = Quantizer(config), None
    optimizer = torch.optim.Adam(quantizer.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step == int(WARM_UP * steps):
            with torch.no_grad():
                codebook = _Codebook(quantizer.vectors(_some(pictures, START)).flatten(0, 1), config.codes)
        batch = _some(pictures, BATCH)
        vectors_NPD, loss = quantizer.vectors(batch), torch.zeros(())
        if codebook:
            quantized_NPD = codebook.quantize(vectors_NPD.detach().flatten(0, 1)).view_as(vectors_NPD)
            loss = COMMITMENT * functional.mse_loss(vectors_NPD, quantized_NPD)
            # The decoder sees the codebook's vectors, and its gradient goes to the encoder's ("straight through").
            vectors_NPD = vectors_NPD + (quantized_NPD - vectors_NPD).detach()
        loss = loss + functional.mse_loss(quantizer.draw(vectors_NPD), _scaled(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert codebook
    quantizer.codebook_CD.copy_(codebook.vectors_CD)
    return quantizer


def _some(pictures: Tensor, count: int) -> Tensor:
    return pictures[torch.randint(len(pictures), (count,))]


class _Codebook:
    """Vectors that follow those which use them: each is their sum over their number, both moving averages."""

    def __init__(self, vectors_MD: Tensor, codes: int) -> None:
        self.vectors_CD = k_means(vectors_MD, codes)
        self._uses_C = torch.ones(codes)
        self._sums_CD = self.vectors_CD.clone()

    def quantize(self, vectors_MD: Tensor) -> Tensor:
        """The nearest vector to each, (M, D). The codebook moves afterwards."""
        codes_M = nearest(vectors_MD, self.vectors_CD)
        quantized_MD = self.vectors_CD[codes_M]
        self._uses_C.mul_(DECAY).add_(torch.bincount(codes_M, minlength=len(self._uses_C)), alpha=1 - DECAY)
        self._sums_CD.mul_(DECAY).index_add_(0, codes_M, vectors_MD, alpha=1 - DECAY)
        unused_C = self._uses_C < LEAST_USE
        self._uses_C[unused_C], self._sums_CD[unused_C] = 1.0, _some(vectors_MD, int(unused_C.sum()))
        self.vectors_CD = self._sums_CD / self._uses_C[:, None]
        return quantized_MD


def k_means(vectors_MD: Tensor, codes: int, rounds: int = 10) -> Tensor:
    """The centres (C, D) of so many groups of vectors. The first centres are drawn as k-means++ draws them."""
    centres = _some(vectors_MD, 1)
    distances_M = ((vectors_MD - centres) ** 2).sum(1)
    while len(centres) < codes:
        far = vectors_MD[torch.multinomial(distances_M + 1e-9, 1)]
        centres, distances_M = torch.cat([centres, far]), distances_M.minimum(((vectors_MD - far) ** 2).sum(1))
    for _ in range(rounds):
        group_M = nearest(vectors_MD, centres)
        sizes_C1 = torch.bincount(group_M, minlength=codes)[:, None]
        sums_CD = torch.zeros_like(centres).index_add_(0, group_M, vectors_MD)
        centres = torch.where(sizes_C1 > 0, sums_CD / sizes_C1.clamp(min=1), centres)
    return centres
