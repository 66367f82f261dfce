"""How good labelled synthetic images are, against real ones: two classifiers and a distance.

Images are float32 [N, 1, S, S] in [-1, 1], labels int64 [N].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor, nn

Features = Callable[[Tensor], Tensor]
"""Images [N, 1, S, S] to float64 [N, D]."""


@dataclass(frozen=True)
class Labelled:
    """Images and what they show."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def svc_accuracy(train: Labelled, test: Labelled) -> float:
    """Accuracy on ``test`` of ``SVC(C=10)`` on pixels, trained on ``train``.  [0, 1]"""
    classifier = SVC(C=10).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    return float(classifier.score(test.images.flatten(1).numpy(), test.labels.numpy()))


def cnn_accuracy(train: Labelled, test: Labelled, seed: int = 0) -> float:
    """Accuracy on ``test`` of a small convolutional network trained on ``train``.  [0, 1]"""
    network = train_cnn(train, seed=seed)
    with torch.no_grad():
        predicted = torch.cat([network(chunk).argmax(1) for chunk in test.images.split(1000)])
    return float((predicted == test.labels).double().mean())


def train_cnn(train: Labelled, *, num_steps: int = 1000, seed: int = 0) -> nn.Sequential:
    """Two convolutions and two dense layers, after a fixed number of steps of Adam.

    Nothing is chosen by looking at real images: no early stopping, no validation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = _cnn(train.images.shape[-1])
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_steps):
            rows = torch.randint(len(train), (128,), generator=generator)
            loss = F.cross_entropy(network(train.images[rows]), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _cnn(size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, 64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(64, 10),
    )


def glyph_features(glyphs: Labelled) -> Features:
    """The 64 values before the last layer of a classifier that has seen rendered glyphs only."""
    network = train_cnn(glyphs)[:-2]
    return partial(_in_chunks, lambda images: network(images))


def inception_features(file: Path) -> Features:
    """The 2,048 values of Inception-v3 that FID is defined by.

    file: the network as TorchScript that takes uint8 [N, 3, H, W] and ``return_features``, such as
        the `inception-2015-12-05.pt` of NVIDIA's FID code. It is code that will run: trust it.
    """
    network = torch.jit.load(file).eval()

    def run(images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return network(pixels, return_features=True)

    return partial(_in_chunks, run)


def _in_chunks(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(chunk).double() for chunk in images.split(500)])


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared 2-Wasserstein distance of the normal laws with the moments of two samples.

    ``|m - n|² + tr(S + T - 2 (S T)^½)`` (Dowson and Landau 1982; Heusel et al. 2017), float64
    [N, D]. It is biased upwards by sampling, more for fewer rows: compare equal numbers.
    """
    (mean_x, cov_x), (mean_y, cov_y) = (_moments(sample.double().numpy()) for sample in (x, y))
    root = _symmetric_root(cov_x)
    # S T and its symmetric form S^½ T S^½ have the same eigenvalues.
    eigenvalues = np.linalg.eigvalsh(root @ cov_y @ root).clip(min=0)
    traces = np.trace(cov_x) + np.trace(cov_y) - 2 * np.sqrt(eigenvalues).sum()
    return float(np.sum((mean_x - mean_y) ** 2) + traces)


def _moments(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return sample.mean(0), np.atleast_2d(np.cov(sample, rowvar=False))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
