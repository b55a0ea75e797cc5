"""Qwen-VL's processor needs torchvision, which must not stand beside torch here: a folder and a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vision_tokens.laws import BARS
from vision_tokens.loading import load

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_qwen_runs_through_its_real_processor_and_says_what_it_needs_without(tmp_path):
    library, checkpoint = tmp_path / "torchvision", tmp_path / "checkpoint"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(library)]
    subprocess.run([*install, "torchvision"], check=True)
    script = ROOT / "tests" / "vision_tokens" / "qwen_with_torchvision.py"
    run = subprocess.run(
        [sys.executable, str(script), str(library), str(checkpoint)],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    laws = json.loads(run.stdout.strip().splitlines()[-1])
    assert laws["dropping equals masking"] < max(BARS.values()) / 1000
    assert laws["removed, nothing is left behind"] == 0

    with pytest.raises(ImportError, match=r"its processor needs a library that is not installed.*need torchvision"):
        load(checkpoint)
