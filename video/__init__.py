"""Long videos: reading them safely and fast, finding the few frames that matter, and measuring the search.

>>> with Film("film.mp4") as film:
...     found = find_keyframes(film, TStar(), ColourShape(), ["red triangle"], frames=8)
>>> processor = mmaccel.apply(processor, KeyframeSearch(TStar(), frames=8))
"""

from typing import TYPE_CHECKING

from mmaccel.lazy import lazy_exports

if TYPE_CHECKING:
    from video.answering import answer as answer
    from video.colour_shape import ColourShape as ColourShape
    from video.dense import AKS as AKS
    from video.dense import BOLT as BOLT
    from video.dense import DenseRetrieval as DenseRetrieval
    from video.dense import Uniform as Uniform
    from video.detectors import Detections as Detections
    from video.detectors import Detector as Detector
    from video.film import Film as Film
    from video.finding import Keyframes as Keyframes
    from video.finding import find_keyframes as find_keyframes
    from video.grounding import AskModel as AskModel
    from video.grounding import Grounding as Grounding
    from video.grounding import WholeQuestion as WholeQuestion
    from video.grounding import Words as Words
    from video.keyframes import KeyframeSearch as KeyframeSearch
    from video.reader import Frame as Frame
    from video.reader import Frames as Frames
    from video.reader import Reader as Reader
    from video.reader import open_video as open_video
    from video.search import FrameSearch as FrameSearch
    from video.search import Haystack as Haystack
    from video.tstar import TStar as TStar

_HOMES = {
    "AKS": "dense",
    "AskModel": "grounding",
    "BOLT": "dense",
    "ColourShape": "colour_shape",
    "DenseRetrieval": "dense",
    "Detections": "detectors",
    "Detector": "detectors",
    "Film": "film",
    "Frame": "reader",
    "FrameSearch": "search",
    "Frames": "reader",
    "Grounding": "grounding",
    "Haystack": "search",
    "KeyframeSearch": "keyframes",
    "Keyframes": "finding",
    "Reader": "reader",
    "TStar": "tstar",
    "Uniform": "dense",
    "WholeQuestion": "grounding",
    "Words": "grounding",
    "answer": "answering",
    "find_keyframes": "finding",
    "open_video": "reader",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
