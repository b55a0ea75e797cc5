"""Autoregressive image models, and speculation that makes them faster without changing what they draw."""

from typing import TYPE_CHECKING

from mmaccel.lazy import lazy_exports

if TYPE_CHECKING:
    from diffusion.autoregressive.configuration import MARConfig as MARConfig
    from diffusion.autoregressive.jacobi import SpeculativeJacobi as SpeculativeJacobi
    from diffusion.autoregressive.modeling import MARModel as MARModel
    from diffusion.autoregressive.speculation import ContinuousSpeculation as ContinuousSpeculation
    from diffusion.autoregressive.zipar import ZipAR as ZipAR

_HOMES = {
    "ContinuousSpeculation": "speculation",
    "MARConfig": "configuration",
    "MARModel": "modeling",
    "SpeculativeJacobi": "jacobi",
    "ZipAR": "zipar",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
