"""How useful synthetic digits are."""

import numpy as np
from sklearn.svm import SVC

from ..data import records as data


def synthetic_accuracy(images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy on the 360 held-out digits of ``SVC(C=10)`` trained on ``images``, in [0, 1].

    images: uint8 [N, 8, 8], labels [N].
    """
    if images.shape[1:] != (8, 8):
        raise ValueError(
            f"images must be uint8 [N, 8, 8] to be compared with the digits, got {images.shape}"
        )
    held_out = data.held_out_digits()
    classifier = SVC(C=10).fit(images.reshape(len(images), -1) / 127.5 - 1, labels)
    return float(classifier.score(held_out.images.flatten(1).numpy(), held_out.labels.numpy()))
