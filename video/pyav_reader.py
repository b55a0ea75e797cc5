"""Reading by PyAV (FFmpeg's libraries): one seek for a group of pictures, frames nobody refers to are not decoded.

Whole files are decoded by several threads.  Those tell of damage late, and take frames with it; so from its first sign
on one thread decodes, which says exactly what it could read.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from video.reader import Frame, Picture, Reader, Times

LOOKAHEAD = 32  # packets; H.264 and H.265 reorder at most 16 frames
NEARBY = 2.0  # seconds; without an index of key frames a shorter way is decoded, a longer one is sought
ATTEMPTS = 8  # key frames tried where a file is damaged
NEVER = 2**62
THREADS = 4  # at most, unless told


class PyAVReader(Reader):
    """A video, open in PyAV.  See `Reader`; threads: of the decoder, None is one more than cores, up to four."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        self.av = _av()
        self.path, self.decoded, self.threads = path, 0, 1
        self.container: Any = None
        try:
            self._learn()
            most = min(THREADS, (os.cpu_count() or 1) + 1) if threads is None else threads
            if most > 1 and not self.counted:
                self.threads = most
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Opens the file, or opens it again, at its start (some formats cannot seek there)."""
        self.close()
        try:
            self.container = self.av.open(str(self.path))
        except (self.av.error.FFmpegError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path} cannot be read as a video ({_said(error)}). An .mp4 whose end is missing has lost its "
                "index: copy it again, or repair it with a tool such as untrunc"
            ) from None
        cover = self.av.stream.Disposition.attached_pic  # a picture on a record's sleeve
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams or streams[0].codec_context is None:
            raise ValueError(f"{self.path} holds no video that can be decoded, only sound or unknown streams")
        self.stream = streams[0]
        self.codec = self.stream.codec_context
        self.codec.thread_count, self.codec.thread_type = self.threads, "AUTO"

    def _learn(self) -> None:
        packets = list(islice(self._packets(), LOOKAHEAD))
        self.tick: Fraction = self.stream.time_base
        reordered = self.container.format.name == "avi" and self.codec.has_b_frames  # times of decoding are all it has
        self.counted = bool(reordered) or any(packet.pts is None for packet in packets)
        if self.counted:  # frame i is shown at i ticks
            self.tick = self._frame_interval(packets)
        first = next((frame for frame in self._decoded() if frame is not None), None)
        if first is None:
            raise ValueError(f"{self.path} holds a video stream in which no frame can be decoded")
        self.start = 0 if self.counted else first.pts
        key = next((packet for packet in packets if packet.is_keyframe), packets[0])
        self.shift = 0 if key.dts is None or self.counted else key.pts - key.dts
        self.end = self._find_end()
        self.duration = float((self.end - self.start) * self.tick)
        self.promised = self.duration
        if self._header_duration() - self.duration >= 1 and not self._sound_goes_on():
            self.promised = self._header_duration()
        self.turns = round(first.rotation / 90) % 4  # anticlockwise
        sides = (first.height, first.width)
        self.height, self.width = sides[::-1] if self.turns % 2 else sides

    # packets

    def _packets(self, at: int | None = None) -> Iterator[Any]:
        """Packets from the key frame at or before a time stamp, or from the start, to where the data ends."""
        if at is None:
            self._open()
        else:
            with suppress(self.av.error.FFmpegError):
                self.container.seek(at, stream=self.stream, backward=True)
            self.codec.flush_buffers()
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    yield packet
        except self.av.error.FFmpegError:
            return  # what can be read was read

    def _group(self, at: int) -> Iterator[Any]:
        """Packets from the last key frame that is shown at or before the time stamp `at`."""
        back, step = at - self.shift, round(1 / self.tick)
        while True:
            packets = self._packets(back)
            head = next((packet for packet in packets if packet.is_keyframe), None)
            if head is not None and head.pts <= at:
                yield head
                yield from packets
                return
            if back < self.start - self.shift:
                yield from self._packets()
                return
            back, step = back - step, 2 * step

    def _find_end(self) -> int:
        """The time stamp at which the last frame that is there goes off."""
        if self.counted:
            return sum(1 for _ in self._packets())
        promise = self.start + int(self._header_duration() / self.tick)
        end = self.start
        for packets in (self._packets(promise - round(1 / self.tick)), self._packets()):
            ends = (packet.pts + (packet.duration or 0) for packet in packets if packet.pts is not None)
            end = max(ends, default=self.start)
            if (promise - end) * self.tick < 1:
                break  # as the header says; else everything is gone through once, without decoding
        return end

    def _sound_goes_on(self) -> bool:
        """Whether another stream lasts as long as the header says, so that nothing is missing."""
        least = float(self.start * self.stream.time_base) + self._header_duration() - 1
        with suppress(self.av.error.FFmpegError):
            self.container.seek(int(least * self.av.time_base), backward=True)
            others = (packet for packet in self.container.demux() if packet.stream is not self.stream and packet.size)
            return any(float(packet.pts * packet.time_base) >= least for packet in others if packet.pts is not None)
        return False

    def _header_duration(self) -> float:
        if self.stream.duration is not None and not self.counted:
            return float(self.stream.duration * self.tick)
        if not self.container.duration:
            return 0.0
        since_zero = "matroska" in self.container.format.name  # what others say counts from the first frame
        late = float(self.start * self.tick) if since_zero else 0.0
        return float(self.container.duration / self.av.time_base) - late

    def _frame_interval(self, packets: list[Any]) -> Fraction:
        """Seconds a frame, from the times of decoding, or else from the rate that the file says."""
        times = [packet.dts for packet in packets if packet.dts is not None]
        if len(times) > 1 and times[-1] > times[0]:
            return Fraction((times[-1] - times[0]) * self.stream.time_base, len(times) - 1)
        rate = self.stream.average_rate or self.stream.guessed_rate
        if not rate:
            raise ValueError(f"{self.path} has neither time stamps nor a frame rate; remux it to .mp4")
        return Fraction(1 / rate)

    # frames

    def _sweep(self, times: Times, size: tuple[int, int]) -> Iterator[Frame]:
        wanted = [self.start + math.floor(Fraction(time) / self.tick + Fraction(1, 10**6)) for time in times.tolist()]
        found: dict[int, Frame] = {}
        waiting = sorted(set(wanted))
        while waiting:
            done = self._count_to(waiting, size) if self.counted else self._read_group(waiting, size)
            found |= done
            waiting = [at for at in waiting if at not in done]
        return (found[at] for at in wanted)

    def _read_group(self, waiting: list[int], size: tuple[int, int]) -> dict[int, Frame]:
        """The frames at as many of the ascending time stamps as share key frames with the first, or lie close."""
        pending: dict[int, list[int]] = {}  # the times at which the frame with this time stamp is shown
        found: dict[int, Frame] = {}
        sound = whole = True
        assigned = 0
        for packet, following in _with_next(self._group(waiting[0])):
            shown = waiting[bisect_left(waiting, packet.pts) : bisect_left(waiting, following)]
            if shown:
                pending[packet.pts] = shown
                assigned += len(shown)
            self.codec.skip_frame = "DEFAULT" if shown else "NONREF"  # a frame that nobody refers to is left out
            sound = self._feed(packet, pending, found, size, sound or packet.is_keyframe)
            whole = whole and sound
            if assigned == len(waiting) or (assigned and self._far(packet.pts, waiting[assigned])):
                break
        whole = self._feed(None, pending, found, size, sound) and whole
        if self.threads > 1 and not whole:
            self.threads = 1
            self._open()
            return self._read_group(waiting, size)
        taken = [at for times in pending.values() for at in times] or waiting[:1]
        return {at: found[at] if at in found else self._stand_in(at, size) for at in taken}

    def _feed(
        self, packet: Any, pending: dict[int, list[int]], found: dict[int, Frame], size: tuple[int, int], sound: bool
    ) -> bool:
        """Decodes a packet (None: what the decoder still holds) and keeps the frames that are wanted.

        sound: whether all that the packet builds upon was decoded; the answer says so for the next one.
        """
        try:
            frames = self.codec.decode(packet)
        except self.av.error.EOFError:
            return sound
        except self.av.error.FFmpegError:
            return False
        for frame in frames:
            self.decoded += 1
            sound = sound and not frame.is_corrupt
            if sound and frame.pts in pending:
                shown = Frame(self._seconds(frame.pts), self._picture(frame, size))
                found.update(dict.fromkeys(pending[frame.pts], shown))
        return sound

    def _far(self, here: int, there: int) -> bool:
        """Whether a seek is shorter than decoding on."""
        index = self.stream.index_entries
        before, after = (index.search_timestamp(at - self.shift) for at in (here, there))
        return after > before if after >= 0 and before >= 0 else (there - here) * self.tick > NEARBY

    def _stand_in(self, at: int, size: tuple[int, int]) -> Frame:
        """The first readable key frame from the one before `at` on; where none follows, from earlier ones."""
        back = at
        for _ in range(ATTEMPTS):
            for number, packet in enumerate(packet for packet in self._group(back) if packet.is_keyframe):
                self.codec.flush_buffers()
                kept: dict[int, Frame] = {}
                self._feed(packet, {packet.pts: [at]}, kept, size, True)
                self._feed(None, {packet.pts: [at]}, kept, size, True)
                if at in kept:
                    return Frame(kept[at].time, kept[at].picture, exact=False)
                if number == ATTEMPTS:
                    break
            back = max(self.start, back - round(10 / self.tick))
        raise ValueError(f"{self.path} is damaged: no frame can be decoded near {self._seconds(at):.3f} seconds")

    def _count_to(self, waiting: list[int], size: tuple[int, int]) -> dict[int, Frame]:
        """The frames of these numbers in a file without time stamps, decoded from its start; beyond, the last."""
        found: dict[int, Frame] = {}
        wanted, last, sound = set(waiting), None, True
        for number, frame in enumerate(self._decoded()):
            if frame is None:
                sound = False
                continue
            last = (number, frame)
            if number in wanted:
                found[number] = Frame(float(number * self.tick), self._picture(frame, size), sound)
            if number >= waiting[-1]:
                break
        if last is None:
            raise ValueError(f"{self.path} holds a video stream in which no frame can be decoded")
        number, frame = last
        rest = Frame(float(number * self.tick), self._picture(frame, size), exact=False)
        return {at: found.get(at, rest) for at in waiting}

    def _decoded(self) -> Iterator[Any]:
        """Every frame from the start in order of presentation; None for a packet that cannot be decoded."""
        self.codec.skip_frame = "DEFAULT"
        for packet in chain(self._packets(), (None,)):
            try:
                frames = self.codec.decode(packet)
            except self.av.error.EOFError:
                return
            except self.av.error.FFmpegError:
                yield None
                continue
            self.decoded += len(frames)
            yield from frames

    def _picture(self, frame: Any, size: tuple[int, int]) -> Picture:
        height, width = size[::-1] if self.turns % 2 else size
        smaller = (height, width) != (frame.height, frame.width)
        made = frame.to_ndarray(
            format="rgb24", height=height, width=width, interpolation="AREA" if smaller else "BICUBIC"
        )
        return np.ascontiguousarray(np.rot90(made, self.turns))

    def _seconds(self, at: int) -> float:
        return float((at - self.start) * self.tick)

    def close(self) -> None:
        if self.container is not None:
            self.container.close()


def _with_next(packets: Iterator[Any]) -> Iterator[tuple[Any, int]]:
    """Every packet with the time stamp at which the next frame comes on; the last frame is never followed."""
    stamped = (packet for packet in packets if packet.pts is not None)
    window = deque(islice(stamped, LOOKAHEAD))
    gone: deque[int] = deque()
    near = sorted(packet.pts for packet in window)  # of what is in the window and of what has just gone
    while window:
        packet = window.popleft()
        place = bisect_right(near, packet.pts)
        yield packet, near[place] if place < len(near) else NEVER
        gone.append(packet.pts)
        if len(gone) > LOOKAHEAD:
            del near[bisect_left(near, gone.popleft())]
        for fresh in islice(stamped, 1):
            window.append(fresh)
            insort(near, fresh.pts)


def _av() -> Any:
    try:
        return import_module("av")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f'videos are read by PyAV, which cannot be imported ({error}); install it: pip install "mmaccel[video]"'
        ) from error


def _said(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
