"""Continuous speculative decoding: a small model drafts tokens, the large one verifies several at once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from mmaccel.attachment import Attachment
from mmaccel.checks import LawResult
from mmaccel.methods import Method, Unsupported

Mode = Literal["exact", "exact-noise", "mixture", "bounded", "published"]


def _check_draft(value: Any) -> Any:
    if isinstance(value, str | Path):
        return str(value)
    from diffusion.autoregressive.modeling import MARModel

    if not isinstance(value, MARModel):
        raise ValueError("a draft is a MARModel, or the folder of one")
    return value


def _describe_draft(value: Any) -> str:
    if isinstance(value, str):
        return value
    folder = str(getattr(value.config, "_name_or_path", ""))
    if not folder or not Path(folder).is_dir():
        raise ValueError(
            "this draft was not loaded from a folder, so it cannot be written down; save it and pass the folder"
        )
    return folder


DraftField: TypeAlias = Annotated[
    Any,
    BeforeValidator(_check_draft),
    PlainSerializer(_describe_draft, return_type=str),
    WithJsonSchema({"type": "string", "description": "the folder of a MARModel"}),
]


@dataclass(frozen=True, kw_only=True)
class ContinuousSpeculation(Method):
    """Let a small model draft an image's tokens, and keep those that the large model could have drawn.

    draft: a MARModel, or its folder, with the target's tokens, labels, head and noise levels; with attention="shared"
    it is a head alone, over the target's backbone; the target itself serves, too.
    length: how many tokens are drafted a round, or "adaptive": as many as pay, by the acceptance and times so far, and
    none if plain generation is faster.
    mode: "exact" compares whole denoising trajectories; "exact-noise" the last step, given the same noise; "mixture"
    the densities of mixture heads; these three draw exactly the target's distribution.  "bounded" keeps every token
    within `tau` of an exact sample.  "published" is the released code of the paper: it is **not** lossless.
    prefill: the share of an image that the target draws alone, first; the paper's, which exact modes do not need.
    guide_draft: whether guidance acts on the draft, too; without, drafts cost half and fewer are kept.
    tau: of the mode "bounded", a Euclidean distance between tokens.
    softening: of the mode "published".
    sweeps: of the mode "exact", where heads have a fixed variance: how often the draft goes over all denoising steps of
    a token at once, a call of its head each time, see `diffusion.autoregressive.chains.sweep_on`; None takes one step
    after the other.

    Draws one token a step (a masked model's `steps` stays None).  Exact modes need a last denoising step that draws
    noise, `config.noisy_end`, in both models: published samplers leave that noise out, and then no draft can be kept.
    Source: arXiv:2411.11925, of which "published" is the release; the exact modes are ours, see
    `diffusion.autoregressive.acceptance`.
    """

    name: ClassVar[str] = "continuous-speculation"
    stages: ClassVar[tuple[str, ...]] = ("sample",)
    needs_processor: ClassVar[bool] = False
    knob: ClassVar[str | None] = None

    draft: DraftField
    length: int | Literal["adaptive"] = 4
    mode: Mode = "exact"
    prefill: float = 0.05
    guide_draft: bool = True
    tau: float | None = None
    softening: float = 42.0
    sweeps: int | None = 2

    def __post_init__(self) -> None:
        if self.length != "adaptive" and self.length < 0:
            raise ValueError(f"length is a number of tokens from 0 up, or 'adaptive'; got {self.length!r}")
        if not 0 <= self.prefill <= 1:
            raise ValueError(f"prefill is the share of the tokens that the target draws alone; got {self.prefill!r}")
        if (self.mode == "bounded") != (self.tau is not None):
            raise ValueError(
                f'tau, a distance from 0 up, belongs to mode="bounded" and to no other; got tau={self.tau!r} with '
                f"mode={self.mode!r}"
            )
        if self.tau is not None and not self.tau >= 0:
            raise ValueError(f"tau is a distance from 0 up; got {self.tau!r}")
        if self.sweeps is not None and self.sweeps < 1:
            raise ValueError(f"sweeps is a number of calls from 1 up, or None for a call a step; got {self.sweeps!r}")
        if self.mode == "published" and self.length in (0, "adaptive"):
            raise ValueError(f'mode="published" has blocks of one length from 1 up; got length={self.length!r}')

    def attach(self, target: Any, attachment: Attachment) -> None:
        draft = loaded(self.draft)
        check_pair(self, target, draft)
        attachment.set_attribute(target, "generate", functools.partial(_generate, self, target, draft, attachment))

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        """What makes speculation right, on these two models."""
        from diffusion.autoregressive.laws import speculation_laws

        return speculation_laws(self, target, inputs)

    def example(self, target: Any, processor: Any) -> dict[str, Any]:
        """A call for two images."""
        return {"labels": [0, target.config.classes - 1]}


def loaded(draft: Any) -> Any:
    """The draft itself."""
    if not isinstance(draft, str):
        return draft
    from diffusion.autoregressive.loading import load

    return load(draft)[0]


def check_pair(method: ContinuousSpeculation, target: Any, draft: Any) -> None:
    """Raises Unsupported where this draft cannot serve this target in this mode; says what to change."""
    from diffusion.autoregressive.modeling import MARModel

    if not isinstance(target, MARModel):
        raise Unsupported(
            f"{method.name} speeds up MARModel, autoregressive models of continuous tokens; got "
            f"{type(target).__name__}. For models of discrete tokens take SpeculativeJacobi"
        )
    mine, theirs = target.config, draft.config
    of_diffusion = ("noise_schedule", "variance", "noisy_end") if mine.head == "diffusion" else ()
    of_trunk = ("hidden_size",) if theirs.attention == "shared" else ()
    for name in ("grid", "token_size", "latent_scale", "classes", "head", *of_diffusion, *of_trunk):
        if getattr(mine, name) != getattr(theirs, name):
            raise Unsupported(
                f"draft and target need the same {name}; got {getattr(theirs, name)!r} and {getattr(mine, name)!r}. "
                "Distil a draft from this target: diffusion.autoregressive.training shows how"
            )
    if theirs.attention == "causal" and mine.attention == "masked":
        raise Unsupported("a causal draft draws in raster order, and this masked target in any; take a masked draft")
    if draft.device != target.device:
        raise Unsupported(f"the draft is on {draft.device}, the target on {target.device}; move one to the other")
    if (method.mode == "mixture") != (mine.head == "mixture"):
        mend = 'mode="mixture", which is exact' if mine.head == "mixture" else 'mode="exact"'
        raise Unsupported(f"mode={method.mode!r} does not fit {mine.head} heads; take {mend}")
    if method.mode in ("exact", "exact-noise") and not mine.noisy_end:
        raise Unsupported(
            f"mode={method.mode!r} needs a last denoising step that draws noise; this model's sampler leaves it out, "
            "and then no two models ever draw the same token. Set config.noisy_end = True in both (noise of the last "
            'step\'s own size is added to every token), or take mode="bounded"'
        )
    if method.mode == "published" and mine.attention == "causal":
        raise Unsupported('mode="published" predicts a block from what lies before it, as only masked models can; '
                          'take mode="exact"')  # fmt: skip


def _generate(
    method: ContinuousSpeculation,
    target: Any,
    draft: Any,
    attachment: Attachment,
    labels: Any = None,
    num_images: int | None = None,
    *,
    generator: Any = None,
    **settings: Any,
) -> Any:
    """`MARModel.generate`, with drafts."""
    import torch

    from diffusion.autoregressive import rounds
    from diffusion.autoregressive.published import published_tokens
    from diffusion.autoregressive.sampling import understood
    from mmaccel.ledger import Ledger

    call = understood(target, labels, num_images, generator, settings)
    tokens = target.config.tokens
    if call.sampling.steps not in (None, tokens):
        raise Unsupported(
            f"{method.name} draws one token a step, {tokens} in all, and steps={call.sampling.steps} is another "
            "distribution; leave steps away"
        )
    report, ledger = attachment.start_report(), Ledger()
    began = time.perf_counter()
    with torch.no_grad():
        steps = call.sampling.diffusion_steps or target.config.diffusion_steps
        drafting = replace(call.sampling, diffusion_steps=steps)
        if not method.guide_draft:
            drafting = replace(drafting, guidance=1.0)
        large, rule = call.run(target, "target", ledger), make_rule(method, target, ledger)
        trunk = large if draft.backbone is None or draft is target else None
        small = replace(call, sampling=drafting).run(draft, "draft", ledger, trunk)
        if method.mode == "published":
            assert isinstance(method.length, int)
            found, tally = published_tokens(call, large, small, rule, method.length, method.prefill, report)
        else:
            prefilled = math.ceil(method.prefill * tokens)
            run = rounds.Rounds(call, large, small, rule, _length(method, report, prefilled), report, prefilled)
            found, tally = run(), run.tally
        images = call.latents(found)
    from diffusion.autoregressive.figures import fill

    fill(report, call, ledger, tally, time.perf_counter() - began)
    return images


def make_rule(method: ContinuousSpeculation, target: Any, ledger: Any) -> Any:
    """The rule of the method's mode for this target."""
    from diffusion.autoregressive import acceptance
    from diffusion.autoregressive.stepwise import StepRule

    if method.mode == "bounded":
        assert method.tau is not None
        return acceptance.BoundedRule(method.tau)
    if method.mode == "published":
        return acceptance.PublishedRule(method.softening, ledger)
    if method.mode == "exact" and target.config.variance != "learned":
        return StepRule(ledger, method.sweeps)
    kinds: dict[str, Callable[[Any], acceptance.Rule]] = {
        "exact": acceptance.TrajectoryRule,
        "exact-noise": acceptance.LastStepRule,
        "mixture": acceptance.MixtureRule,
    }
    return kinds[method.mode](ledger)


def _length(method: ContinuousSpeculation, report: Any, prefilled: int) -> Any:
    from diffusion.autoregressive.lengths import best_length

    fixed = method.length
    if fixed == "adaptive":
        return lambda tally: best_length(tally, report.seconds["prefill"] / prefilled if prefilled else None)
    return lambda tally: fixed
