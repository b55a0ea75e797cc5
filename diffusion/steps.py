"""Steps from one level to another, x' = p x0 + q eps + s z, from the denoiser's estimates at the first level.

A step's coefficients are float64.  Levels and times may be vectors: then so are the steps.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion.particles import Level, Step
from diffusion.paths import Path


def ode(to: Level) -> Step:
    """Along the probability flow, x' = alpha' x0 + sigma' eps: DDIM without noise, and Euler's step of a linear path.

    Needs no level to come from: the estimates say it all.  First order.
    """
    return Step(to.alpha, to.sigma, torch.zeros_like(to.sigma), to)


def ddim(now: Level, to: Level, eta: float) -> Step:
    """DDIM's step with `eta` times DDPM's noise, on any path.

    s = eta sigma'/sigma sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2), and q^2 + s^2 = sigma'^2.
    Source: arXiv:2010.02502, equations 12 and 16, where alpha^2 + sigma^2 = 1; scaled to any other norm it is the same.
    From pure noise (alpha = 0) the step draws eta sigma' of fresh noise.
    """
    kept = now.sigma**2 - (now.alpha / to.alpha * to.sigma) ** 2
    s = torch.where(to.sigma > 0, eta * to.sigma / now.sigma * kept.clamp_min(0).sqrt(), 0.0)
    return Step(to.alpha, (to.sigma**2 - s**2).clamp_min(0).sqrt(), s, to)


def euler_maruyama(
    path: Path, t: Float64[Tensor, "*rows"], later: Float64[Tensor, "*rows"], g: Float64[Tensor, "*rows"]
) -> Step:
    """One step of dx = [u - g^2/2 score] dt + g dW from t down to `later`, which lies nearer to the data.

    x' = x + h (-u + g^2/2 score) + g sqrt(h) z with h = t - later, written in x0 and eps: score = -eps / sigma.
    Keeps the path's marginals for every g >= 0 as h goes to 0.  Source: arXiv:2503.19385, section 4.1.
    """
    h = t - later
    (alpha, sigma), (signal, noise) = path.level(t), path.slopes(t)
    return Step(alpha - h * signal, sigma - h * noise - h * g**2 / (2 * sigma), g * h.sqrt(), path.level(later))


def renoise(now: Level, to: Level) -> Step:
    """Exactly the forward process: x' = (alpha'/alpha) x + what noise is missing.

    Holds for any (x0, eps) with x = alpha x0 + sigma eps, be they estimates at x or at where a step led here from.
    Raises ValueError if the new level is less noisy.
    """
    shrink = to.alpha / now.alpha
    missing = to.sigma**2 - (shrink * now.sigma) ** 2
    if (missing < -1e-12).any():
        raise ValueError(
            f"re-noising goes to more noise; got alpha/sigma from {(now.alpha / now.sigma).tolist()} to "
            f"{(to.alpha / to.sigma).tolist()}, which has less of it. For less noise take an `ode` or `ddim` step"
        )
    return Step(to.alpha, shrink * now.sigma, missing.clamp_min(0).sqrt(), to)
