"""Better samples of any diffusers pipeline for the same compute: searches over noise and paths, and rewards.

`diffusion.autoregressive` holds autoregressive image models, and speculation that makes them faster.

>>> pipe = mmaccel.apply(pipe, RolloverBudgetForcing(reward=rewards.ClipScore(), nfe=500))
>>> image = pipe("four red squares", num_inference_steps=10).images[0]
>>> print(mmaccel.report(pipe))
"""

from typing import TYPE_CHECKING

from mmaccel.lazy import lazy_exports

if TYPE_CHECKING:
    from diffusion import rewards as rewards
    from diffusion.beam_search import LatentBeamSearch as LatentBeamSearch
    from diffusion.best_of_n import BestOfN as BestOfN
    from diffusion.blockwise import CoDe as CoDe
    from diffusion.noise_search import RandomSearch as RandomSearch
    from diffusion.noise_search import ZeroOrderSearch as ZeroOrderSearch
    from diffusion.particle_filter import ParticleFilter as ParticleFilter
    from diffusion.pipelines import stop as stop
    from diffusion.replay import Replay as Replay
    from diffusion.rollover import RolloverBudgetForcing as RolloverBudgetForcing
    from diffusion.search import Search as Search
    from diffusion.search_over_paths import SearchOverPaths as SearchOverPaths
    from diffusion.svdd import SVDD as SVDD

_HOMES = {
    "BestOfN": "best_of_n",
    "CoDe": "blockwise",
    "LatentBeamSearch": "beam_search",
    "ParticleFilter": "particle_filter",
    "RandomSearch": "noise_search",
    "Replay": "replay",
    "RolloverBudgetForcing": "rollover",
    "SVDD": "svdd",
    "Search": "search",
    "SearchOverPaths": "search_over_paths",
    "ZeroOrderSearch": "noise_search",
    "stop": "pipelines",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
