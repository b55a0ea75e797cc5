"""The video part of `mmaccel bench diffusion`: searches of pocket-video by a calibrated reward.

No single reward of videos says what people want: CLIP sees no motion, and motion alone is easily gamed.  So the reward
is a weighted mean of several, fitted to a judge on clips of its own, as in arXiv:2501.19252, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion.beam_search import LatentBeamSearch
from diffusion.bench_samples import Setting, Settings, quiet_pipeline
from diffusion.best_of_n import BestOfN
from diffusion.rewards.calibration import Calibrated, calibrate
from diffusion.rewards.clip import ClipScore
from diffusion.rewards.pocket import PocketJudge
from diffusion.rewards.preprocessing import to_bytes
from diffusion.rewards.video import MotionMagnitude, MotionSmoothness, SubjectConsistency, TemporalConsistency
from mmaccel.bench import Progress, silent
from mmaccel.pocket import call_defaults, motion

MODEL = "pocket-video"
STEPS = 10
REWARDS = (
    ClipScore(),
    SubjectConsistency(),
    TemporalConsistency(),
    MotionSmoothness(),
    MotionMagnitude(log=True),
)
REWARD = Calibrated(rewards=REWARDS, weights=(1, 0, 0, 0, 0))
"""What `fit(200)` found."""


def videos(budgets: Sequence[int]) -> Settings:
    """Searches of pocket-video; the judges read the clip: all of it, or how its things move."""
    found: dict[str, Setting] = {"plain.20": Setting(BestOfN(REWARD, 1), STEPS)}
    for nfe in budgets:
        each = nfe // 2  # evaluations; the pipeline runs with guidance
        found[f"best-of-n.{nfe}"] = Setting(BestOfN(REWARD, each // STEPS), STEPS)
        candidates = (each - 1) // (2 * (STEPS - 1))
        found[f"dlbs-lookahead.{nfe}"] = Setting(LatentBeamSearch(REWARD, 1, candidates, 2, eta=1.0), STEPS)
    return Settings(
        model=MODEL,
        prompts=lambda count: motion.prompts(count, seed=1),
        reward=REWARD,
        judges={"success": _success, "graded": _graded, "motion": _moved},
        settings=found,
        baseline=lambda name: [] if name.startswith(("plain", "best")) else [f"best-of-n.{name.rpartition('.')[2]}"],
    )


def fit(clips: int, progress: Progress = silent) -> Calibrated:
    """The weights of `REWARDS` that agree best with the graded judge, on plain clips of held-out prompts.

    The prompts are others than the bench's; each clip has a seed of its own.
    """
    pipeline, arguments = quiet_pipeline(MODEL), {**call_defaults(MODEL), "num_inference_steps": STEPS}
    prompts, made = motion.prompts(clips, seed=2), []
    for number, prompt in enumerate(prompts):
        progress("clips", number, clips)
        generator = torch.Generator().manual_seed(2_000_000 + number)
        made.append(torch.as_tensor(pipeline(prompt, generator=generator, output_type="pt", **arguments)[0]))
    return calibrate(REWARDS, PocketJudge(), torch.cat(made), prompts)


def _clip(frames: torch.Tensor) -> motion.Clip:
    clip: motion.Clip = to_bytes(frames)
    return clip


def _success(prompt: str, frames: torch.Tensor) -> float:
    return float(motion.satisfies_motion(prompt, _clip(frames)))


def _graded(prompt: str, frames: torch.Tensor) -> float:
    return motion.score_motion(prompt, _clip(frames))


def _moved(prompt: str, frames: torch.Tensor) -> float:
    return motion.moved_as_said(prompt, _clip(frames))
