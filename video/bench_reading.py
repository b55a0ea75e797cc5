"""How fast and in how much memory scattered frames are read, beside OpenCV's seek and read."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmaccel.bench import Figure, Progress, interleave, median, median_ratio
from video.bench_quality import Found, haystack
from video.reader import Picture, open_video

if TYPE_CHECKING:
    from video.bench import VideoBench

HEIGHT, WIDTH, RATE, GROUP = 360, 640, 30, 250
SHOT = 156  # frames from one cut to the next, so that ten minutes have 116 key frames
BITS = 16
FRAMES = 64
CLUSTERS, CLUSTER_SECONDS = 4, 10
MEMORY_MINUTES = (10, 120)
PROBE = """
import pathlib, re, sys
from video import ColourShape, Film, TStar, find_keyframes
with Film(sys.argv[1]) as film:
    ColourShape()(film.frames([0.0], film.short).pictures, ["red circle"])
    for name in sys.argv[2:]:
        find_keyframes(film, TStar(), ColourShape(), [name], frames=8, budget=0.5)
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
"""A process that sees one frame, or searches for names, one after another; says the peak of its memory in kB."""


def film_of_numbers(path: Path, seconds: int) -> Path:
    """Writes an H.264 video, 640 x 360 at 30 frames a second, whose frames carry their numbers as bars on noise.

    The noise drifts for 5.2 s, then jumps: 116 key frames in ten minutes, groups of 156 frames, two B-frames in a row.
    """
    av = import_module("av")
    ground = np.random.default_rng(0).integers(60, 140, (HEIGHT, WIDTH + SHOT, 3)).astype(np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "bf": "2", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = GROUP
        for number in range(seconds * RATE):
            shift = number % SHOT
            picture = ground[:, shift : shift + WIDTH].copy()
            picture[: HEIGHT // 4] = np.repeat([255 * (number >> bit & 1) for bit in range(BITS)], WIDTH // BITS)[
                None, :, None
            ]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def number_of(picture: Picture) -> int:
    """The number that a frame of such a video carries."""
    columns = (np.arange(BITS) * WIDTH // BITS) + WIDTH // BITS // 2
    return int(sum(1 << bit for bit, column in enumerate(columns) if picture[HEIGHT // 8, column].mean() > 128))


def reading(bench: VideoBench, folder: Path, progress: Progress) -> Found:
    """64 frames, scattered and in four clusters of ten seconds: our reader's time over OpenCV's, in the same rounds.

    Each with as many threads as it takes by itself, and both with one.
    """
    path = folder / f"shots-{bench.reading_seconds}.mp4"
    progress("writing the video", 0, 1)
    if not path.exists():
        film_of_numbers(path, bench.reading_seconds)
    total, rng = bench.reading_seconds * RATE, np.random.default_rng(0)
    starts = rng.integers(0, total - CLUSTER_SECONDS * RATE, CLUSTERS)
    wanted = {
        "scattered": rng.choice(total, FRAMES, replace=False),
        "clustered": np.concatenate(
            [start + rng.choice(CLUSTER_SECONDS * RATE, FRAMES // CLUSTERS, replace=False) for start in starts]
        ),
    }
    wrong: dict[str, int] = dict.fromkeys(wanted, 0)

    def ours(name: str, threads: int | None) -> Callable[[], None]:
        def run() -> None:
            with open_video(path, "pyav", threads) as video:
                pictures = video.frames_at((wanted[name] + 0.5) / RATE).pictures
            wrong[name] += sum(number_of(one) != number for one, number in zip(pictures, wanted[name], strict=True))

        return run

    def theirs(name: str, threads: int | None) -> Callable[[], None]:
        def run() -> None:
            cv2 = import_module("cv2")
            settings = [] if threads is None else [cv2.CAP_PROP_N_THREADS, threads]
            capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, settings)
            for number in wanted[name]:
                capture.set(cv2.CAP_PROP_POS_FRAMES, int(number))
                capture.read()[1][..., ::-1].copy()
            capture.release()

        return run

    runs = {
        f"{who}.{name}.{threads}": _timed(run(name, threads))
        for name in wanted
        for threads in (None, 1)
        for who, run in (("ours", ours), ("opencv", theirs))
    }
    found = interleave(runs, bench.rounds, progress=progress)
    figures: dict[str, Figure] = {}
    for name in wanted:
        mine, other, mine_alone, other_alone = (
            found[f"{who}.{name}.{threads}"] for threads in (None, 1) for who in ("ours", "opencv")
        )
        figures[f"reading.{name}"] = median_ratio(mine["seconds"], other["seconds"])
        figures[f"reading_cpu.{name}"] = median_ratio(mine["cpu"], other["cpu"])
        figures[f"reading_one_thread.{name}"] = median_ratio(mine_alone["seconds"], other_alone["seconds"])
        figures[f"reading_seconds.{name}"] = median(mine["seconds"], "s")
        figures[f"wrong_frames.{name}"] = Figure(float(wrong[name]))
    return figures, []


def _timed(function: Callable[[], None]) -> Callable[[], dict[str, float]]:
    """A run that says how many seconds it took, and how many of a processor's: OpenCV decodes in several threads."""

    def run() -> dict[str, float]:
        start, cpu = time.perf_counter(), time.process_time()
        function()
        return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}

    return run


def memory(folder: Path, progress: Progress) -> Found:
    """The peak of a process that searches a short and a long video, above one that has only loaded the libraries."""
    figures: dict[str, Figure] = {}
    for number, minutes in enumerate(MEMORY_MINUTES):
        progress("memory", number, len(MEMORY_MINUTES))
        made = haystack(folder, 60 * minutes, 0)
        names = [event.target.name for event in made.events]
        idle, busy = (_peak(made.path, asked) for asked in ([], names))
        figures[f"peak_mb.{minutes}"] = Figure(busy - idle, unit="MB")
    return figures, []


def _peak(path: Path, names: list[str]) -> float:
    done = subprocess.run([sys.executable, "-c", PROBE, str(path), *names], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1]) / 1024
