"""Public training data: digits drawn from the fonts that matplotlib ships.

Every glyph is kept as two distance fields, one to its outline and one to its centre line (the
ridge of the first). A threshold on the outline's field prints the glyph, a threshold on the centre
line's field writes it with a pen of any width. Warping a field before the threshold slants, bends
and shakes the digit while its strokes stay solid.

The last step is the public preprocessing of the NIST forms (Garris et al., NISTIR 5469; Alpaydin
and Kaynak, UCI "Optical Recognition of Handwritten Digits"): crop to the ink, scale to a 32x32
bitmap, count the ink in blocks of 4x4.
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

CLASS_NAMES = [str(digit) for digit in range(10)]

FONTS = [
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmb10",
    "cmmi10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
]

# Forms that people write and fonts lack, as pen paths (x, y) in a box of height 1, y downwards.
WRITTEN = {
    1: [[(0.0, 0.0), (0.0, 1.0)]],
    4: [[(-0.3, 0.0), (-0.35, 0.5), (0.3, 0.5)], [(0.2, 0.05), (0.15, 1.0)]],
    6: [[(0.3, 0.0), (-0.2, 0.5), (-0.3, 0.8), (0.0, 1.0), (0.25, 0.8), (0.0, 0.6), (-0.25, 0.75)]],
    7: [[(-0.3, 0.0), (0.3, 0.0), (-0.1, 1.0)], [(-0.2, 0.5), (0.3, 0.5)]],
    9: [[(0.3, 0.1), (-0.1, 0.0), (-0.3, 0.25), (-0.1, 0.5), (0.3, 0.1), (0.2, 1.0)]],
}
WRITTEN_STYLES = 6

CANVAS = 64
BITMAP = 32
BLOCK = 4
GLYPH_HEIGHT = 36
OVERSAMPLING = 4


def glyphs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random digits, each class `count // 10` times or once more.

    Returns images float32 [count, 1, 8, 8] in [-1, 1] and labels int64 [count], in random order.
    """
    ink, labels = written_digits(count, generator)
    return block_counts(ink) / 8 - 1, labels


def written_digits(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random digits before any preprocessing, each class `count // 10` times or once more.

    Returns ink float32 [count, CANVAS, CANVAS] in [0, 1], labels int64 [count], in random order.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}; ask for at least one glyph")
    labels = torch.arange(count) % 10
    labels = labels[torch.randperm(count, generator=generator)]
    fields, is_pen = _distance_fields()
    style = torch.randint(fields.shape[1], (count,), generator=generator)
    return _ink(fields[labels, style], is_pen[style], generator), labels


def centred(ink: Tensor, size: int = 28, box: int = 20) -> Tensor:
    """Ink in a box, its centre of mass in the middle of the image, as MNIST has it.

    Ink float32 [B, S, S] in [0, 1] to grey [B, 1, size, size] in [0, 1]: the longer side of what is
    above 0.5 becomes ``box`` pixels, by area. An empty image gives zeros. (LeCun et al. 1998,
    Gradient-based learning applied to document recognition, section III.A.)
    """
    on = (ink > 0.5).float()
    height, width = _extent(on.any(2))[1], _extent(on.any(1))[1]
    at = torch.arange(ink.shape[-1]) + 0.5
    mass = on.sum((1, 2)).clamp(min=1)
    middle_row, middle_col = ((on.sum(axis) * at).sum(1) / mass for axis in (2, 1))
    pixel = torch.maximum(height, width) / box
    steps = (torch.arange(size * OVERSAMPLING) + 0.5) / OVERSAMPLING - size / 2
    rows, cols = (m[:, None] + steps * pixel[:, None] for m in (middle_row, middle_col))
    fine = (_sample(ink, rows[:, :, None], cols[:, None, :]) > 0.5).float()
    return F.avg_pool2d(fine[:, None], OVERSAMPLING)


def block_counts(ink: Tensor) -> Tensor:
    """Size-normalised 32x32 bitmaps counted in 4x4 blocks: ink [B, H, W] -> [B, 1, 8, 8] in 0..16.

    The box around the ink (values > 0.5) is scaled to the full height, its width in proportion but
    never beyond the bitmap, and centred. An empty image gives zeros.
    """
    on = ink > 0.5
    top, height = _extent(on.any(2))
    left, width = _extent(on.any(1))
    scaled_width = (width / height).clamp(max=1.0)
    steps = (torch.arange(BITMAP) + 0.5) / BITMAP
    rows = top[:, None] + steps * height[:, None]
    cols = left[:, None] + ((steps - 0.5) / scaled_width[:, None] + 0.5) * width[:, None]
    bitmap = (_sample(ink, rows[:, :, None], cols[:, None, :]) > 0.5).float()
    return F.avg_pool2d(bitmap[:, None], BLOCK) * BLOCK**2


def _extent(on: Tensor) -> tuple[Tensor, Tensor]:
    """First index and length of the span that holds every True.  [B, S] -> [B], [B]"""
    size = on.shape[1]
    first = on.float().argmax(1)
    last = size - 1 - on.flip(1).float().argmax(1)
    return first.float(), (last - first + 1).float()


def _sample(images: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Bilinear values at pixel positions (pixel i covers i..i+1).  [B, H, W] -> [B, h, w]"""
    height, width = images.shape[1:]
    rows, cols = torch.broadcast_tensors(rows, cols)
    grid = torch.stack([2 * cols / width - 1, 2 * rows / height - 1], dim=-1)
    return F.grid_sample(images[:, None], grid, align_corners=False, padding_mode="zeros")[:, 0]


def _ink(fields: Tensor, is_pen: Tensor, generator: torch.Generator) -> Tensor:
    """Warped and thresholded distance fields, float32 [B, CANVAS, CANVAS] in [0, 1]."""
    count = len(fields)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    angle, shear = 0.12 * normal(1, 1), 0.15 + 0.25 * normal(1, 1)
    stretch = torch.exp(0.15 + 0.2 * normal(1, 1))
    bend = _smooth(normal(2, CANVAS, CANVAS)) * uniform(0.0, 4.0)[..., None]

    # The positions in the source that each canvas pixel shows, around the canvas centre.
    centre = CANVAS / 2
    row, col = torch.meshgrid(*2 * [torch.arange(CANVAS) + 0.5 - centre], indexing="ij")
    row, col = row / 0.85 + bend[:, 0], col / 0.85 + bend[:, 1]
    col = (col + shear * row) / stretch
    row, col = row * angle.cos() - col * angle.sin(), row * angle.sin() + col * angle.cos()
    # Sampling reads zeros outside the canvas; complements make that far from the ink, not in it.
    distance = CANVAS - _sample(CANVAS - fields, row + centre, col + centre)

    pen, press = uniform(1.6, 4.5), uniform(-0.3, 2.0)
    return torch.sigmoid(2 * (torch.where(is_pen[:, None, None], pen, press) - distance))


def _smooth(fields: Tensor) -> Tensor:
    """White noise [B, C, S, S] to smooth noise of unit variance, a few bumps across the canvas."""
    coarse = F.adaptive_avg_pool2d(fields, 5) * (fields.shape[-1] / 5)
    return F.interpolate(coarse, fields.shape[-2:], mode="bicubic", align_corners=True)


@cache
def _distance_fields() -> tuple[Tensor, Tensor]:
    """Every style of every digit: fields [10, S, CANVAS, CANVAS] in pixels, is_pen [S] bool."""
    prints = [[_print(font, digit) for font in FONTS] for digit in range(10)]
    pens = [[_centre_line(field) for field in fields] for fields in prints]
    written = [
        [_pen_path(WRITTEN[digit]) if digit in WRITTEN else pens[digit][0]] * WRITTEN_STYLES
        for digit in range(10)
    ]
    fields = torch.from_numpy(np.concatenate([prints, pens, written], axis=1)).float()
    is_pen = torch.arange(fields.shape[1]) >= len(FONTS)
    return F.avg_pool2d(fields, OVERSAMPLING) / OVERSAMPLING, is_pen


def _print(font: str, digit: int) -> np.ndarray:
    """Signed distance to the outline of one printed digit, negative in the ink, oversampled."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    typeface = ImageFont.truetype(str(path), 400)
    box = typeface.getbbox(str(digit))
    image = Image.new("L", (box[2] - box[0], box[3] - box[1]))
    ImageDraw.Draw(image).text((-box[0], -box[1]), str(digit), fill=255, font=typeface)
    side, height = OVERSAMPLING * CANVAS, OVERSAMPLING * GLYPH_HEIGHT
    width = round(image.width * height / image.height)
    canvas = Image.new("L", (side, side))
    canvas.paste(image.resize((width, height)), ((side - width) // 2, (side - height) // 2))
    on = np.asarray(canvas) > 127
    return ndimage.distance_transform_edt(~on) - ndimage.distance_transform_edt(on)


def _centre_line(outline: np.ndarray) -> np.ndarray:
    """Distance to the ridge of a signed distance field: the path of the pen."""
    slope = np.hypot(*np.gradient(ndimage.gaussian_filter(outline, 1.0)))
    # A corner of angle a has slope sin(a / 2): the bound keeps strokes and drops right angles.
    return ndimage.distance_transform_edt((slope > 0.65) | (outline > 0))


def _pen_path(paths: list[list[tuple[float, float]]]) -> np.ndarray:
    """Distance to polylines given in glyph heights, oversampled."""
    side, height = OVERSAMPLING * CANVAS, OVERSAMPLING * GLYPH_HEIGHT
    image = Image.new("1", (side, side), 1)
    for path in paths:
        points = [(side / 2 + height * x, (side - height) / 2 + height * y) for x, y in path]
        ImageDraw.Draw(image).line(points, fill=0)
    return ndimage.distance_transform_edt(np.asarray(image))
