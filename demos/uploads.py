"""What comes from a browser is what it says it is, and no larger than it may be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
PIXELS = 40_000_000
VIDEO_SECONDS = 2 * 60 * 60


def checked_picture(file: str | None) -> Image.Image:
    """The uploaded picture, RGB and upright; told by its content.  Raises ValueError that says what is wrong."""
    from PIL import Image, UnidentifiedImageError

    from vision_tokens.loading import open_picture

    if file is None:
        raise ValueError("choose a picture first, or one of the examples")
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"this file is no picture of the kinds {', '.join(FORMATS)}") from None
    if width * height > PIXELS:
        raise ValueError(f"pictures have at most {PIXELS // 10**6} million pixels; this one has {width} x {height}")
    return open_picture(file)


def checked_video(file: str | None) -> Path:
    """The uploaded video; told by its content.  Raises ValueError that says what is wrong, ImportError for an extra."""
    from video.reader import open_video

    if file is None:
        raise ValueError("choose a video first, or the example")
    try:
        with open_video(file) as reader:
            duration, pixels = reader.duration, reader.width * reader.height
    except (ValueError, OSError) as error:
        message = str(error).replace(str(file), "this file")
        raise ValueError(message) from None
    if duration > VIDEO_SECONDS or pixels > PIXELS:
        raise ValueError(
            f"videos are at most {VIDEO_SECONDS // 3600} hours long and {PIXELS // 10**6} million pixels large"
        )
    return Path(file)
