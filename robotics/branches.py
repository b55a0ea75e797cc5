"""Several branches of pi0's denoising behind one prefix, in the model's own `sample_actions`.

The prefix is read once.  In each denoising step a hook hands the model its rows several times over, with a copy of the
prefix's cache that has as many; the sampler goes on with what comes out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from robotics.horizons import ByHorizon, disagreement, fused, gate_weights, reaches

REPEATED = ("state", "timestep", "attention_mask", "pixel_attention_mask")


@dataclass(frozen=True)
class HorizonGate:
    """What training with several horizons adds to pi0: their lengths, ascending, and a linear gate of one output.

    linear: from the expert's width to one.  The longest horizon is the model's chunk.
    """

    horizons: tuple[int, ...]
    linear: nn.Module

    def check(self, chunk: int) -> None:
        """Raises ValueError unless the horizons ascend to the chunk's length."""
        if list(self.horizons) != sorted(set(self.horizons)) or self.horizons[-1] != chunk or self.horizons[0] < 1:
            raise ValueError(f"horizons ascend to the model's chunk of {chunk} actions; got {list(self.horizons)}")


class Repeated:
    """Within the block, every denoising step of `model` works on `copies` of each row.

    before: changes the repeated arguments.  after: what the sampler gets of the velocities, [rows, steps, dims].
    """

    def __init__(
        self,
        model: Any,
        copies: int,
        before: Callable[[dict[str, Any]], None] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.copies, self.before, self.after = model, copies, before, after
        self._cache: Any = None
        self._undo = ExitStack()

    def __enter__(self) -> None:
        enter = self.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._undo.callback(enter.remove)
        self._undo.callback(self.model.register_forward_hook(self._leave).remove)

    def __exit__(self, *error: object) -> None:
        self._undo.close()
        self._cache = None

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        if self._cache is None:
            self._cache = copy.deepcopy(kwargs["past_key_values"])
            self._cache.batch_repeat_interleave(self.copies)
            self._length = self._cache.get_seq_length()
        kwargs["past_key_values"] = self._cache
        for name in REPEATED:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].repeat_interleave(self.copies, dim=0)
        if self.before is not None:
            self.before(kwargs)
        return args, kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._cache.crop(self._length - self._cache.get_seq_length())
        if self.after is not None:
            output.logits = self.after(output.logits)


@dataclass
class HorizonRun:
    """One chunk by several horizons: hides from each branch the actions behind its own, and fuses what they say.

    dims: numbers of an action that the robot has; the others are padding, and no disagreement.
    """

    gate: HorizonGate
    dims: int
    total: Tensor | None = None
    steps: int = 0
    weights: list[Tensor] = field(default_factory=list)
    hidden: Tensor | None = None

    @property
    def length(self) -> int:
        """Actions in the chunk."""
        return self.gate.horizons[-1]

    def truncate(self, kwargs: dict[str, Any]) -> None:
        """Every branch gets the chunk's beginning, and zeros behind it."""
        noise: Float[Tensor, "rows steps dims"] = kwargs["noise"]
        valid = reaches(self.gate.horizons, self.length, noise.device).T.to(noise.dtype)
        kwargs["noise"] = rearrange(noise[:, None] * valid[..., None], "rows branches ... -> (rows branches) ...")

    def hide(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hides from a branch the actions that it does not have."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise Unsupported(
                "branches of several horizons need an attention mask with an entry for every pair of tokens; load the "
                "model with attn_implementation='sdpa'"
            )
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if not bool(shown[..., -self.length :, -self.length :].all()):
            raise Unsupported(
                "the actions of this model do not all see each other, so that a shorter horizon would say the same as "
                "a longer one; horizons agree on everything there, and tell nothing"
            )
        rows = len(mask) // len(self.gate.horizons)
        valid = reaches(self.gate.horizons, self.length, mask.device).T.repeat(rows, 1)
        own = torch.cat([valid.new_ones(len(mask), mask.shape[-1] - self.length), valid], dim=-1)[:, None, None]
        hidden = torch.finfo(mask.dtype).min if mask.dtype != torch.bool else False
        return args, {**kwargs, "attention_mask": mask.masked_fill(~own, hidden)}

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keeps the expert's hidden states of the actions, for the gate."""
        self.hidden = output.last_hidden_state[:, -self.length :]

    def fuse(self, velocity: Float[Tensor, "branches steps dims"]) -> Float[Tensor, "rows steps dims"]:
        """The velocity that the sampler goes on with; adds up how far the horizons are from it."""
        assert self.hidden is not None
        split = "(rows branches) steps dims -> rows branches steps dims"
        logits = rearrange(self.gate.linear(self.hidden), split, branches=len(self.gate.horizons))[..., 0]
        branches = rearrange(velocity, split, branches=len(self.gate.horizons))
        weights = gate_weights(logits.transpose(1, 2), self.gate.horizons)
        mean = fused(branches, weights)
        differ = disagreement(branches[..., : self.dims], mean[..., : self.dims], weights)
        self.total = differ if self.total is None else self.total + differ
        self.steps += 1
        self.weights.append(weights)
        return mean


def sample_by_horizon(model: Any, gate: HorizonGate, dims: int, sample: Callable[[], Tensor]) -> ByHorizon:
    """What `sample`, a call of the model's sampler, gives when all horizons of the gate denoise together."""
    run = HorizonRun(gate, dims)
    with ExitStack() as undo:
        undo.callback(model.model.dit.register_forward_pre_hook(run.hide, with_kwargs=True).remove)
        undo.callback(model.model.dit.register_forward_hook(run.keep).remove)
        undo.enter_context(Repeated(model, len(gate.horizons), run.truncate, run.fuse))
        actions = sample()
    assert run.total is not None
    return ByHorizon(actions, run.total / run.steps, weights=run.weights)
