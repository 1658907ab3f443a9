"""What a still image shows: upright, in colors of 8 bits.

Open-Sora's loader leaves both to Pillow, which clips gray of 16 bits at 255, so that it trains nearly white, and leaves
photos on their side whose camera noted how it was held. The tables of Open-Sora's tools have the sizes of upright ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag for how the camera was held
# Its values 2 to 8, as names of what Pillow is to do; 1 is upright.
TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
SWAPS_SIDES = 5


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened image when it stands upright; nothing is decoded."""
    return (image.width, image.height) if _read_orientation(image) >= SWAPS_SIDES else (image.height, image.width)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image of any mode, upright, in RGB of 8 bits.

    Of 16 bits the upper 8 are kept, in gray as Pillow does it in color. Transparency is dropped, as Open-Sora's loader
    does: a transparent pixel shows the color that is stored for it.

    Raises:
        ValueError: see `check_levels`; or whatever Pillow raises, of any class, where the file is damaged.
    """
    from PIL import Image

    check_levels(image)
    orientation = _read_orientation(image)
    if _is_16_bit_gray(image):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    return image if orientation == 1 else image.transpose(Image.Transpose[TURNS[orientation - 2]])


def check_levels(image: Image.Image) -> None:
    """ValueError if nothing says which of an opened image's levels is white: those of 32 bits, whole or not."""
    if image.mode in ("I", "F") and not _is_16_bit_gray(image):
        raise ValueError("its levels have 32 bits, of which none is known to be white: save it with 8 or 16")


def _is_16_bit_gray(image: Image.Image) -> bool:
    # Mode I has 32 bits; Pillow puts the 16 of PGM into it, and older versions those of PNG.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _read_orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF numbers them. Pillow itself turns TIFF, which has no EXIF part in its `info`."""
    if "exif" not in image.info:
        return 1
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # damaged notes beside a good picture; Pillow's readers let all kinds of exceptions out
        return 1
    return found if found in range(1, len(TURNS) + 2) else 1
