"""Copies of a record within a data set, as far as they can be seen without reading it."""

from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset


def refuse_copies(dataset: Dataset, unit_ids: np.ndarray | None = None) -> None:
    """Raise ValueError where one record stands in ``dataset`` twice under two units.

    unit_ids: int64 [N], 0 to U - 1, whose each record is; without them each is a unit of its own.

    Seen are equal indices in a Subset, a data set that a ConcatDataset holds twice, one picture
    object twice in a list of pictures, and diffusers' DreamBooth data set whose length is more
    than its instance images. Not seen is what only reading would show, as equal files.
    """
    originals = _originals(dataset, {})
    units = np.arange(len(originals)) if unit_ids is None else unit_ids
    pairs = originals * (units.max(initial=0) + 1) + units
    if len(np.unique(originals)) < len(np.unique(pairs)):
        raise ValueError(
            "the dataset has a record under several numbers (repeats, a Subset with an index "
            "twice, or a ConcatDataset whose parts share some), each of which would be sampled on "
            "its own and protect a part of it: leave the copies out (more epochs train as often), "
            "or give unit_ids in which all copies of a record have one id"
        )


def _originals(dataset: Any, first: dict[int, tuple[int, int]]) -> np.ndarray:
    """A number for each record of ``dataset``, equal where the record is.  int64 [N]

    first: the first number and how many numbers of each data set met before, by its identity.
    """
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_originals(part, first) for part in dataset.datasets])
    if isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices)
        if indices.dtype.kind in "iu":
            return _originals(dataset.dataset, first)[indices]
    size = len(dataset)
    start = sum(n for _, n in first.values())
    start, _ = first.setdefault(id(dataset), (start, size))
    return start + _pictures(dataset, size)


def _pictures(dataset: Any, size: int) -> np.ndarray:
    """Which picture each record shows, where the data set keeps a list of them.  int64 [size]"""
    # diffusers' DreamBooth scripts take index % num_instance_images, and repeat what is in a list.
    n_pictures = getattr(dataset, "num_instance_images", size)
    if not isinstance(n_pictures, int) or n_pictures < 1:
        n_pictures = max(size, 1)
    places = np.arange(size) % n_pictures
    for pictures in getattr(dataset, "__dict__", {}).values():
        if isinstance(pictures, list) and len(pictures) == n_pictures and _are_pillow(pictures):
            objects = [id(picture) for picture in pictures]
            return np.unique(objects, return_inverse=True)[1][places]
    return places


def _are_pillow(pictures: list) -> bool:
    return bool(pictures) and all(hasattr(p, "convert") and hasattr(p, "mode") for p in pictures)
