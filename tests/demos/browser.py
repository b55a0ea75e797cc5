"""Debian's Chromium without a window, and the page of `mmaccel app` in it."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
PATIENCE = int(os.environ.get("MMACCEL_PATIENCE", "120"))  # seconds for anything on a crowded machine
START = "import sys; from mmaccel.cli import main; sys.argv = ['mmaccel', 'app', *sys.argv[1:]]; main()"


def missing() -> str | None:
    """What the browser tests lack, if anything, and how to get it."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"there is no {program}: apt-get install chromium chromium-driver"
    for library in ("gradio", "selenium"):
        try:
            __import__(library)
        except ImportError as error:
            return f"{library} cannot be imported ({error}): pip install 'mmaccel[dev]'"
    return None


class App:
    """The running command: its address, its process, and what it has printed."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self.process, self.log = process, log
        self.address = ""
        self.cpu_seconds_to_page = 0.0


@contextmanager
def running_app(*options: str) -> Iterator[App]:
    """`mmaccel app` in a process of its own on a free port, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": folder}
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", START, "--port", "0", *options],
                stdout=out, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
            )  # fmt: skip
        app = App(process, log)
        try:
            app.address = until(lambda: _address(app), "the page's address")
            times = psutil.Process(process.pid).cpu_times()
            app.cpu_seconds_to_page = times.user + times.system
            yield app
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _address(app: App) -> str:
    if app.process.poll() is not None:
        raise RuntimeError(f"mmaccel app ended: {app.log.read_text()}")
    lines = [line for line in app.log.read_text().splitlines() if line.startswith("mmaccel app: ")]
    return lines[0].removeprefix("mmaccel app: ") if lines else ""


def until(found: Callable[[], T], what: str, seconds: float = PATIENCE) -> T:
    """The first true value of `found`.  Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < end, f"no {what} within {seconds} seconds"
        time.sleep(0.05)


@contextmanager
def chromium(width: int = 1280, height: int = 1000, dark: bool = False) -> Iterator[Any]:
    """A browser of its own, with nothing remembered, that calls nobody."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for option in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            "--force-prefers-reduced-motion",
            f"--user-data-dir={profile}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        ):  # fmt: skip
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        try:
            resize(browser, width, height)
            yield browser
        finally:
            browser.quit()


def resize(browser: Any, width: int, height: int) -> None:
    """Makes the page this many CSS pixels wide and high, narrower than any window, too."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
