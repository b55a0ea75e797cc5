"""Robot policies that see less and act as well.

>>> policy = PI0Policy(model, PI0Inputs(processor, cameras), cameras=cameras, dims=7)
>>> control = Controller(mmaccel.apply(policy, VLAPruner(kept_share=0.25)))
>>> control.reset()
>>> action = control.step(Observation({"top": pictures}, state, ["push the red disc onto the blue square"]))
"""

from typing import TYPE_CHECKING

from mmaccel.lazy import lazy_exports

if TYPE_CHECKING:
    from robotics.action_tokens import ActionBins as ActionBins
    from robotics.action_tokens import ActionTokenPolicy as ActionTokenPolicy
    from robotics.action_tokens import Quantiles as Quantiles
    from robotics.baselines import FixedHorizon as FixedHorizon
    from robotics.baselines import TemporalEnsembling as TemporalEnsembling
    from robotics.branches import HorizonGate as HorizonGate
    from robotics.control import Controller as Controller
    from robotics.episodes import reset as reset
    from robotics.flow import PI0Inputs as PI0Inputs
    from robotics.flow import PI0Policy as PI0Policy
    from robotics.horizons import HorizonConsensus as HorizonConsensus
    from robotics.lerobot import LerobotPolicy as LerobotPolicy
    from robotics.observations import Observation as Observation
    from robotics.policies import Chunk as Chunk
    from robotics.policies import Inputs as Inputs
    from robotics.policies import Places as Places
    from robotics.policies import Policy as Policy
    from robotics.sample_consensus import SampleConsensus as SampleConsensus
    from robotics.vla_cache import VLACache as VLACache
    from robotics.vla_pruner import VLAPruner as VLAPruner

_HOMES = {
    "ActionBins": "action_tokens",
    "ActionTokenPolicy": "action_tokens",
    "Chunk": "policies",
    "Controller": "control",
    "FixedHorizon": "baselines",
    "HorizonConsensus": "horizons",
    "HorizonGate": "branches",
    "Inputs": "policies",
    "LerobotPolicy": "lerobot",
    "Observation": "observations",
    "PI0Inputs": "flow",
    "PI0Policy": "flow",
    "Places": "policies",
    "Policy": "policies",
    "Quantiles": "action_tokens",
    "SampleConsensus": "sample_consensus",
    "TemporalEnsembling": "baselines",
    "VLACache": "vla_cache",
    "VLAPruner": "vla_pruner",
    "reset": "episodes",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
