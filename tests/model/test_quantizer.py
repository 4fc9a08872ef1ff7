"""model/quantizer.py: nearest codes and k-means against plain numpy, and a codebook that reads pictures."""

import numpy as np
import torch

from model.quantizer import Quantizer, QuantizerConfig, fit, k_means, nearest

CONFIG = QuantizerConfig(side=8, patch=4, codes=6, width=16, vector=4)


def pictures(count: int) -> torch.Tensor:
    """Each quarter of a picture is black, or one of four bright colours; the noise is small."""
    draws = np.random.default_rng(1)
    colours = np.array([[20, 20, 20], [230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20]])
    cells = colours[draws.integers(5, size=(count, 2, 2))].transpose(0, 3, 1, 2)
    noisy = cells.repeat(4, 2).repeat(4, 3) + draws.integers(-20, 21, (count, 3, 8, 8))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


def test_the_nearest_vector_is_that_of_least_distance() -> None:
    draws = np.random.default_rng(0)
    vectors, codebook = draws.normal(size=(50, 3)), draws.normal(size=(7, 3))
    distances = ((vectors[:, None] - codebook) ** 2).sum(-1)
    found = nearest(torch.from_numpy(vectors), torch.from_numpy(codebook))
    assert found.tolist() == distances.argmin(1).tolist()


def test_k_means_finds_groups_that_lie_apart() -> None:
    torch.manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = (middles[:, None] + torch.randn(3, 40, 2) * 0.1).flatten(0, 1)
    centres = k_means(vectors, 3)
    means = torch.stack([group.mean(0) for group in vectors.split(40)])
    torch.testing.assert_close(centres[centres.sum(1).argsort()][0], means[0])
    torch.testing.assert_close(sorted(centres.tolist()), sorted(means.tolist()))


def test_a_trained_quantiser_draws_pictures_from_codes() -> None:
    seen, new = pictures(400)[:300], pictures(400)[300:]
    quantizer = fit(CONFIG, seen, steps=150, seed=2)
    codes = quantizer.encode(new)
    assert codes.shape == (100, 4) and codes.dtype == torch.int64 and 5 <= len(codes.unique()) <= CONFIG.codes
    drawn = quantizer.decode(codes)
    assert drawn.shape == new.shape and drawn.min() >= 0 and drawn.max() <= 255
    error, error_of_mean = (((each - new.float()) ** 2).mean() for each in (drawn, seen.float().mean(0)))
    assert error < error_of_mean / 10
    # A code stands for one colour: patches of the same colour have the same codes.
    red, green = new[:, 0, ::4, ::4].flatten(1) > 200, new[:, 1, ::4, ::4].flatten(1) > 200
    reds, greens = (set(codes[chosen].tolist()) for chosen in (red & ~green, green & ~red))
    assert reds and greens and not reds & greens


def test_the_same_arguments_give_the_same_weights() -> None:
    def trained(seed: int) -> Quantizer:
        return fit(CONFIG, pictures(64), steps=10, seed=seed)

    one, again, other = trained(2).state_dict(), trained(2).state_dict(), trained(3).state_dict()
    assert all(one[name].equal(again[name]) for name in one)
    assert not one["codebook_CD"].equal(other["codebook_CD"])
