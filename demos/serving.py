"""What all tabs share: runs that can be stopped, errors as messages, and a private folder for what is uploaded."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, TypeVar

from mmaccel.cli import USER_ERRORS
from mmaccel.registry import suggest

T = TypeVar("T")
TEXT = 500  # letters of a question or a prompt


class Told(RuntimeError):
    """An error as the page shows it."""


@dataclass(frozen=True)
class Limits:
    """upload: bytes of a file.  seconds: of one run.  waiting: runs in the queue.  working: runs at once."""

    upload: int = 64 * 2**20
    seconds: float = 600
    waiting: int = 16
    working: int = 2


class Runs:
    """The runs that go on, by the session of the browser's page that started them."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._stops: dict[str, list[threading.Event]] = defaultdict(list)
        self._stopped: set[str] = set()

    def ask(self, session: str) -> None:
        """Says that this session wants a run; a stop from now on ends it, though it may wait or load its model yet."""
        self._stopped.discard(session)

    @contextmanager
    def begin(self, session: str) -> Iterator[threading.Event]:
        """A run of this session; the event says when it has to end, which is after `seconds` at the latest."""
        stop = threading.Event()
        timer = threading.Timer(self.seconds, stop.set)
        timer.daemon = True
        timer.start()
        self._stops[session].append(stop)
        if session in self._stopped:
            stop.set()
        try:
            yield stop
        finally:
            timer.cancel()
            stop.set()
            self._stops[session].remove(stop)
            if not self._stops[session]:
                self._stops.pop(session)

    def stop(self, session: str) -> None:
        """Ends every run of this session, as soon as each can, those that have not begun among them."""
        self._stopped.add(session)
        for stop in list(self._stops.get(session, ())):
            stop.set()

    def leave(self, session: str) -> None:
        """Ends every run of a session whose page is gone, and forgets it."""
        self.stop(session)
        self._stopped.discard(session)


def streamed(work: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
    """What `work` hands to the function it gets, as it comes; it works in a thread of its own.

    Raises what `work` raised.
    """
    found: SimpleQueue[Any] = SimpleQueue()
    end, failures = object(), list[BaseException]()

    def run() -> None:
        try:
            work(found.put)
        except BaseException as error:
            failures.append(error)
        finally:
            found.put(end)

    threading.Thread(target=run, daemon=True).start()
    yield from iter(found.get, end)
    if failures:
        raise failures[0]


def in_words(error: Exception) -> Told:
    """What the page says of an error: the message of one that a wrong input caused, and no more of any other."""
    if isinstance(error, (*USER_ERRORS, RuntimeError)):
        return Told(" ".join(str(error).split()) or type(error).__name__)
    traceback.print_exception(error)
    return Told(f"this went wrong in a way that nobody foresaw ({type(error).__name__}); the terminal says where")


def one_of(given: object, known: list[str], kind: str) -> str:
    """`given`, if it is among `known`: a browser may send anything.  Raises ValueError, naming the nearest."""
    if not isinstance(given, str) or given not in known:
        raise ValueError(f"choose a {kind}; there is no {str(given)[:80]!r}: {suggest(str(given)[:80], known)}")
    return given


def short_text(given: object, what: str) -> str:
    """A text that is neither empty nor too long.  Raises ValueError."""
    text = given.strip() if isinstance(given, str) else ""
    if not 0 < len(text) <= TEXT:
        raise ValueError(f"{what} has 1 to {TEXT} letters; got {len(text)}")
    return text


def between(given: Any, low: int, high: int, what: str) -> int:
    """A whole number within its bounds.  Raises ValueError."""
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not low <= given <= high or given != int(given):
        raise ValueError(f"{what} is a whole number from {low} to {high}; got {given!r}")
    return int(given)


def example_file(name: str) -> Path:
    """A file that comes with the page."""
    return Path(__file__).parent / "examples" / name


@contextmanager
def private_folder() -> Iterator[Path]:
    """The one folder that uploads and results go to, readable by this user alone, gone when the block ends.

    SIGTERM ends the block as Ctrl-C does.
    """
    folder = Path(tempfile.mkdtemp(prefix="mmaccel-app-"))
    os.environ |= {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
    }
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield folder
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
