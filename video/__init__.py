"""Long videos: reading them safely and fast, finding the few frames that matter, and measuring the search.

>>> with open_video("film.mp4") as film:
...     frames = film.frames_at([12.0, 3.5, 60.0])
"""

from typing import TYPE_CHECKING

from mmaccel.lazy import lazy_exports

if TYPE_CHECKING:
    from video.reader import Frame as Frame
    from video.reader import Frames as Frames
    from video.reader import Reader as Reader
    from video.reader import open_video as open_video

_HOMES = {"Frame": "reader", "Frames": "reader", "Reader": "reader", "open_video": "reader"}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
