"""Scores against closed forms, another library and images whose answer is known."""

import warnings

import numpy as np
import pytest
import torch
from scipy import linalg

from bench import scores
from bench.scores import Labelled


def normals(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


def bars(count, seed, size=8):
    """Class 0 has a bright upper half, class 1 a bright lower one, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.randn(count, 1, size, size, generator=generator)
    images[labels == 0, :, : size // 2] += 0.5
    images[labels == 1, :, size // 2 :] += 0.5
    return Labelled(images, labels)


def test_a_shift_counts_squared():
    x, shift = normals(200, 5), torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5])
    assert scores.frechet_distance(x, x + shift) == pytest.approx(14.25)
    assert scores.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_a_scale_counts_by_its_standard_deviations():
    """tr(S + 4 S - 2 (4 S²)^½) = tr S, and the mean moves by itself."""
    x = normals(300, 4)
    expected = x.numpy().var(0, ddof=1).sum() + (x.mean(0) ** 2).sum().item()
    assert scores.frechet_distance(x, 2 * x) == pytest.approx(expected)


def test_moments_that_do_not_commute_agree_with_the_square_root_of_scipy():
    x, y = normals(50, 6) @ normals(6, 6, 1), normals(80, 6, 2) @ normals(6, 6, 3)
    s, t = (np.cov(sample.numpy(), rowvar=False) for sample in (x, y))
    root = np.real(linalg.sqrtm(s @ t))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(s + t - 2 * root)
    assert scores.frechet_distance(x, y) == pytest.approx(expected)


def test_fewer_rows_than_columns_make_no_nan():
    assert scores.frechet_distance(normals(3, 20), normals(4, 20, 1)) > 0


def test_the_network_learns_what_can_be_told_apart_and_nothing_else():
    train, test = bars(200, 0), bars(200, 1)
    network = scores.train_cnn(train, num_steps=30)
    with torch.no_grad():
        assert (network(test.images).argmax(1) == test.labels).double().mean() > 0.95
    shuffled = Labelled(train.images, train.labels[torch.randperm(200)])
    assert scores.svc_accuracy(train, test) > 0.95
    assert 0.2 < scores.svc_accuracy(shuffled, test) < 0.8


def test_a_seed_fixes_the_network_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second = (scores.train_cnn(bars(50, 0), num_steps=2) for _ in range(2))
    other = scores.train_cnn(bars(50, 0), num_steps=2, seed=1)
    image = bars(1, 3).images
    assert torch.equal(first(image), second(image)) and not torch.equal(first(image), other(image))
    assert torch.equal(torch.get_rng_state(), before)


def test_accuracy_is_the_share_that_the_network_names_right(monkeypatch):
    test = bars(40, 2)
    monkeypatch.setattr(
        scores, "train_cnn", lambda *_, **__: lambda images: images.flatten(1)[:, :2]
    )
    flat = test.images.flatten(1)
    expected = ((flat[:, 1] > flat[:, 0]).long() == test.labels).double().mean()
    assert scores.cnn_accuracy(test, test) == expected


def test_features_are_those_before_the_last_layer(monkeypatch):
    network = scores.train_cnn(bars(50, 0), num_steps=2)
    monkeypatch.setattr(scores, "train_cnn", lambda *_: network)
    images = bars(1100, 1).images
    found = scores.glyph_features(bars(1, 0))(images)
    assert found.shape == (1100, 64) and found.dtype == torch.float64
    assert torch.allclose(network[-1](found.float()), network(images), atol=1e-5)


class Moments(torch.nn.Module):
    """Stands for Inception: takes bytes of three channels, gives mean and maximum."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        y = x.to(torch.float32).flatten(1)
        return torch.stack([y.mean(1), y.amax(1)], 1) if return_features else y


def test_inception_is_given_bytes_of_three_channels(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Moments()).save(tmp_path / "network.pt")
        features = scores.inception_features(tmp_path / "network.pt")
        images = torch.tensor([-1.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2)
        found = features(images)
    assert found.tolist() == [[(0 + 255 + 128 + 255) / 4, 255.0]]
