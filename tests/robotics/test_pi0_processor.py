"""pi0's processor needs torchvision, which must not stand beside torch here: a folder and a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robotics.tiny import DIMS, HORIZON, PATCHES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_pi0_runs_through_its_real_processor(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, "torchvision"], check=True)
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "robotics" / "pi0_with_torchvision.py"), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["pictures"] < 1e-5 and found["state"] < 1e-5
    assert found["shown"] == [[True, True], [True, False]]
    assert found["actions"] == [2, HORIZON, DIMS]
    assert [sum(kept) for kept in found["kept"]] == [PATCHES // 2, PATCHES // 4] and found["kept"][1][1] == 0
    assert "takes the first cameras of top, wrist and pads the last" in found["refused"]
