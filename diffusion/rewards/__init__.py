"""What a search maximises: rewards of pictures and of videos, and how to combine them."""

from typing import TYPE_CHECKING

from mmaccel.lazy import lazy_exports

if TYPE_CHECKING:
    from diffusion.rewards.aesthetic import Aesthetic as Aesthetic
    from diffusion.rewards.base import Prompts as Prompts
    from diffusion.rewards.base import Reward as Reward
    from diffusion.rewards.base import RewardField as RewardField
    from diffusion.rewards.base import as_reward as as_reward
    from diffusion.rewards.base import get_reward as get_reward
    from diffusion.rewards.base import list_rewards as list_rewards
    from diffusion.rewards.base import plain as plain
    from diffusion.rewards.base import reward_from_dict as reward_from_dict
    from diffusion.rewards.calibration import Calibrated as Calibrated
    from diffusion.rewards.calibration import calibrate as calibrate
    from diffusion.rewards.checking import Scores as Scores
    from diffusion.rewards.checking import checked as checked
    from diffusion.rewards.checking import scored as scored
    from diffusion.rewards.clip import ClipScore as ClipScore
    from diffusion.rewards.inputs import ImageReward as ImageReward
    from diffusion.rewards.inputs import VideoReward as VideoReward
    from diffusion.rewards.language import VqaScore as VqaScore
    from diffusion.rewards.models import release_models as release_models
    from diffusion.rewards.open_clip_score import OpenClipScore as OpenClipScore
    from diffusion.rewards.pictures import Brightness as Brightness
    from diffusion.rewards.pictures import Colourfulness as Colourfulness
    from diffusion.rewards.pictures import Contrast as Contrast
    from diffusion.rewards.pictures import JpegCompressibility as JpegCompressibility
    from diffusion.rewards.pocket import PocketJudge as PocketJudge
    from diffusion.rewards.video import MotionMagnitude as MotionMagnitude
    from diffusion.rewards.video import MotionSmoothness as MotionSmoothness
    from diffusion.rewards.video import SubjectConsistency as SubjectConsistency
    from diffusion.rewards.video import TemporalConsistency as TemporalConsistency

_HOMES = {
    "Aesthetic": "aesthetic",
    "Brightness": "pictures",
    "Calibrated": "calibration",
    "ClipScore": "clip",
    "Colourfulness": "pictures",
    "Contrast": "pictures",
    "ImageReward": "inputs",
    "JpegCompressibility": "pictures",
    "MotionMagnitude": "video",
    "MotionSmoothness": "video",
    "OpenClipScore": "open_clip_score",
    "PocketJudge": "pocket",
    "Prompts": "base",
    "Reward": "base",
    "RewardField": "base",
    "Scores": "checking",
    "SubjectConsistency": "video",
    "TemporalConsistency": "video",
    "VideoReward": "inputs",
    "VqaScore": "language",
    "as_reward": "base",
    "calibrate": "calibration",
    "checked": "checking",
    "get_reward": "base",
    "list_rewards": "base",
    "plain": "base",
    "release_models": "models",
    "reward_from_dict": "base",
    "scored": "checking",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
