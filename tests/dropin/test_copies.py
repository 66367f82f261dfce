"""One record several times in a data set: seen where it can be, and refused unless one unit."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from dpengine import PrivacyEngine
from dpengine.dropin.copies import refuse_copies

N = 6


class Numbers(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.tensor(float(index))


class DreamBooth(Numbers):
    """As in diffusers' scripts: ``repeats`` of each picture, and as long as the class images."""

    def __init__(self, pictures, *, repeats=1, n_class_images=0):
        self.instance_images = [picture for picture in pictures for _ in range(repeats)]
        self.num_instance_images = len(self.instance_images)
        self.captions = ["a picture"] * self.num_instance_images
        self._length = max(n_class_images, self.num_instance_images)

    def __len__(self):
        return self._length


def pictures():
    return [Image.new("L", (2, 2), value) for value in range(3)]


def numbers():
    return Numbers()


DATA = numbers()
COPIES = {
    "concat": (ConcatDataset([DATA] * 3), np.tile(np.arange(N), 3)),
    "subset": (Subset(DATA, [0, 1, 1]), np.array([0, 1, 1])),
    "from the end": (Subset(DATA, [0, N - 1, -1]), np.array([0, 1, 1])),
    "tensor": (Subset(DATA, torch.tensor([2, 2])), np.array([7, 7])),
    "nested": (Subset(Subset(DATA, [4, 3]), [0, 1, 0]), np.array([0, 1, 0])),
    "overlap": (ConcatDataset([Subset(DATA, [0, 1]), Subset(DATA, [1])]), np.array([0, 1, 1])),
    "repeats": (DreamBooth(pictures(), repeats=3), np.repeat(np.arange(3), 3)),
    "class images": (DreamBooth(pictures(), n_class_images=7), np.arange(7) % 3),
    "both": (DreamBooth(pictures(), repeats=2, n_class_images=8), np.arange(8) % 6 // 2),
}


@pytest.mark.parametrize(("data", "own"), COPIES.values(), ids=COPIES)
def test_copies_are_refused_unless_they_are_of_one_unit(data, own):
    """``own``: one id for each record that is really there."""
    with pytest.raises(ValueError, match=r"several numbers.*unit_ids in which all copies"):
        refuse_copies(data)
    with pytest.raises(ValueError, match="several numbers"):
        refuse_copies(data, np.arange(len(data)))
    refuse_copies(data, own)
    refuse_copies(data, np.zeros_like(own))  # more in one unit protects more


@pytest.mark.parametrize(
    "data",
    [
        DATA,
        TensorDataset(torch.zeros(4, 3)),  # equal values are not one record
        Subset(DATA, [3, 1, -1]),
        ConcatDataset([Numbers(), Numbers()]),
        ConcatDataset(random_split(DATA, [2, 4])),
        DreamBooth(pictures()),
        Subset(DATA, []),
    ],
    ids=["numbers", "tensors", "subset", "two", "split", "dreambooth", "empty"],
)
def test_records_that_come_once_are_not_refused(data):
    refuse_copies(data)


def test_make_private_refuses_them_before_anything_is_changed():
    module = torch.nn.Linear(3, 1)
    how = {
        "module": module,
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
    }
    once = TensorDataset(torch.eye(3))
    thrice = DataLoader(ConcatDataset([once] * 3), batch_size=3)
    with pytest.raises(ValueError, match="several numbers"):
        PrivacyEngine().make_private(data_loader=thrice, **how)
    assert all(param.grad_fn is None and param.requires_grad for param in module.parameters())
    PrivacyEngine().make_private(
        data_loader=thrice, unit_ids=["a", "b", "c"] * 3, rows_per_unit=3, **how
    )
