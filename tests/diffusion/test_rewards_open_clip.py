"""The open_clip adapter: the real library in a folder and a process of its own, because it imports torchvision."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.rewards import OpenClipScore
from tests.diffusion.reward_inputs import pictures

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_adapter_scores_as_open_clip_does(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "library")]
    needed = ["open_clip_torch>=3", "torchvision", "timm", "ftfy", "wcwidth"]
    fetched = subprocess.run([*install, *needed], capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"pip cannot fetch open_clip: {fetched.stderr.strip()[-200:]}")
    script = ROOT / "tests" / "diffusion" / "open_clip_with_torchvision.py"
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "library"), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    for differences in found["scores"]:
        assert differences["own"] < differences["spread"] / 20  # Pillow rounds to 8 bits
        assert differences["rows"] < 1e-5
    assert "open_clip has no model 'ViT-B-31'; open_clip.list_models() lists them" in found["model"]
    assert "'open' is neither a .safetensors file nor a tag of ViT-B-32; its tags: openai" in found["pretrained"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ImportError(\"No module named 'torchvision'\")", "No module named 'torchvision'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
    ],
)
def test_a_missing_or_mismatched_library_names_the_extra_and_the_trap(tmp_path, monkeypatch, body, said):
    (tmp_path / "open_clip.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    images, prompts = pictures(1)
    with pytest.raises(ImportError) as caught:
        OpenClipScore(model="ViT-B-32", pretrained="openai")(images, prompts)
    message = str(caught.value)
    assert f"open-clip-score needs open_clip, which cannot be imported ({said})" in message
    assert 'pip install "mmaccel[clip]"' in message and "build (CPU or CUDA) as your torch" in message


def test_a_prompt_is_needed():
    with pytest.raises(ValueError, match="open-clip-score compares pictures with their prompts"):
        OpenClipScore(model="ViT-B-32", pretrained="openai")(pictures(1)[0], None)
