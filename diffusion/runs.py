"""One call of a decorated pipeline.

The pipeline's loop is kept as a skeleton.  The denoiser tap records its calls and answers them at no cost; the
scheduler's `step`, replaced for the length of the run, learns from the first step how the pipeline works, lets the
search work on in proportion to the loop, and hands the pipeline the best sample so far.  So progress bars, callbacks
and interrupts act as ever.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusion.call_arguments import generators_of, prompts_of, samples_of
from diffusion.checks import check_search, refuse_state
from diffusion.denoiser import DENOISERS, Call, DenoiserTap, check_inputs, same_inputs, told_at
from diffusion.finalists import record
from diffusion.guidance import find_rule
from diffusion.host import Conditions, PipelineHost, with_second_network
from diffusion.particles import Particles
from diffusion.problem import Problem
from diffusion.rewards.base import as_reward
from diffusion.search import Rounds, Search
from diffusion.tail import Tail
from mmaccel.attachment import patched
from mmaccel.ledger import Ledger
from mmaccel.methods import Unsupported
from mmaccel.reports import Report


class Run:
    """What a plain run and a search share.  Made when a call begins, gone when it ends.

    arguments: of the call, by name.  samples: how many the pipeline makes in it, each searched for itself.
    """

    def __init__(
        self,
        search: Search,
        pipeline: Any,
        plain: Callable[..., Any],
        arguments: dict[str, Any],
        stopped: threading.Event,
        report: Report,
    ) -> None:
        self.search, self.pipeline, self.plain, self.arguments = search, pipeline, plain, arguments
        self.stopped, self.report = stopped, report
        self.samples = samples_of(arguments)
        self.prompts = prompts_of(arguments, self.samples)
        self.reward = as_reward(search.reward)
        self.tail = Tail(pipeline, plain, arguments, self.samples)
        self.copies = 1  # of the latents that the pipeline hands its scheduler (DiT doubles them under guidance)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of clean latents, by the pipeline's own tail."""
        return self.tail.decode(latents, self.copies)


class PlainRun(Run):
    """Nothing to choose: the plain pipeline, bit for bit, its rows counted.  Nothing is scored."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.ledger = Ledger()

    def __call__(self) -> Any:
        with counted_rows(self.pipeline, self.ledger):
            return self.plain(self.pipeline, **self.arguments)

    def fill(self) -> None:
        """Writes the report."""
        rows = self.ledger.spent.get("denoiser_rows", 0)
        self.report.record("denoiser_rows", rows, rows)
        self.report.record("decodes", 0)
        self.report.record("reward_calls", 0)


@contextmanager
def counted_rows(pipeline: Any, ledger: Ledger) -> Iterator[None]:
    """Counts the denoiser rows of a plain pipeline's calls in the block."""

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        with ledger.spend("denoiser_rows", len(latents)):
            pass

    with ExitStack() as undo:
        for name in DENOISERS:
            module = getattr(pipeline, name, None)
            if isinstance(module, torch.nn.Module):
                undo.callback(module.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield


class SearchRun(Run):
    """A search for every sample that the pipeline makes."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.conditions: Conditions | None = None
        self.problems: list[Problem] = []
        self.rounds: list[Rounds] = []
        self.progress = [0.0] * self.samples
        self.finalists: list[Particles | None] = [None] * self.samples
        self.steps_done = 0

    def __call__(self) -> Any:
        refuse_state(self.pipeline)
        check_search(self.search, self.pipeline.scheduler)
        self.seeds, self.generators = generators_of(self.arguments, self.samples)
        self.tap = DenoiserTap(self.pipeline)
        with ExitStack() as undo:
            for owner, name, value in self.tap.patches():
                undo.enter_context(patched(owner, name, value))
            undo.enter_context(patched(self.pipeline.scheduler, "step", self._step()))
            undo.enter_context(self.tail.remembering())
            generator = self.generators if self.samples > 1 else self.generators[0]
            return self.plain(self.pipeline, **{**self.arguments, "generator": generator})

    # the pipeline's loop

    def _step(self) -> Callable[..., Any]:
        original = self.pipeline.scheduler.step
        signature = inspect.signature(original)

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            as_dict = arguments.pop("return_dict", True)
            if self.tail.decoding is not None:
                self.tap.take()
                latents = self.tail.given(arguments["sample"])
            else:
                latents = self._advance(**arguments)
            return _Stepped(latents) if as_dict else (latents,)

        return step

    def _advance(self, model_output: Tensor, timestep: Any, sample: Tensor, **arguments: Any) -> Tensor:
        """One step of the pipeline's loop: what it gets in place of the scheduler's next latents."""
        calls = self.tap.take()
        if self.conditions is None:
            self.copies = len(sample) // self.samples
            self.conditions = self._learn(calls, model_output, timestep, sample, arguments)
            self._begin()
        else:
            self._verify(self.conditions, calls, model_output, timestep, sample)
        self.steps_done += 1
        steps = len(self.conditions.times)
        due = self.steps_done / steps if self.steps_done < steps else math.inf
        with self.report.phase("search"), self.tap.listening(False):
            for row in range(self.samples):
                self._work(row, due)
                if self.steps_done == steps:
                    self._rewind(row)
        latents = torch.cat([self._best(row) for row in range(self.samples)])
        self.handed = torch.cat([latents] * self.copies).to(sample)
        return self.handed

    def _learn(
        self, calls: list[Call], model_output: Tensor, timestep: Any, sample: Tensor, arguments: dict[str, Any]
    ) -> Conditions:
        """What the first step shows of the pipeline.  Raises Unsupported where that cannot be replayed."""
        name = type(self.pipeline).__name__
        if not calls:
            raise Unsupported(f"{name} called none of {', '.join(DENOISERS)} before its scheduler's step")
        check_inputs(calls, self.samples)
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        vars(scheduler).pop("step")
        scales = hasattr(scheduler, "scale_model_input")
        seen = copy.deepcopy(scheduler).scale_model_input(sample, timestep) if scales else sample
        for call in calls:
            given = call.inputs[call.latents]
            expected = torch.cat([seen[: self.samples]] * call.passes(self.samples)).to(given)
            if given.shape != expected.shape or not torch.allclose(given, expected, rtol=1e-3, atol=1e-3):
                raise Unsupported(
                    f"the denoiser of {name} sees more than the latents ({list(given.shape)} beside "
                    f"{list(expected.shape)}): masks or pictures among its channels, which cannot be searched"
                )
        outputs = [part for call in calls for part in call.output.chunk(call.passes(self.samples))]
        rule = find_rule(outputs, model_output[: self.samples], self._numbers())
        if rule is None:
            raise Unsupported(
                f"no known rule of guidance makes what {name} hands its scheduler of its denoiser's {len(outputs)} "
                "outputs; known are none, classifier-free guidance, and its rescaled and length-keeping variants"
            )
        rules = {calls[0].denoiser: rule}
        boundary = getattr(self.pipeline.config, "boundary_ratio", None)
        if boundary is not None:
            boundary *= scheduler.config.num_train_timesteps
            rules = with_second_network(rules, self.arguments.get("guidance_scale_2"))
        time = torch.as_tensor(timestep)
        return Conditions(
            networks=self.tap.networks,
            calls=calls,
            rules=rules,
            rows=self.samples,
            scheduler=scheduler,
            first=int((scheduler.timesteps.to(time) - time).abs().argmin()),
            step_arguments=arguments,
            told=told_at(calls, timestep),
            boundary=boundary,
            latents=sample[: self.samples],
            model_dtype=model_output.dtype,
        )

    def _verify(
        self, known: Conditions, calls: list[Call], model_output: Tensor, timestep: Any, sample: Tensor
    ) -> None:
        """Raises Unsupported if a later step is not like the first."""
        same_inputs(known.calls, calls)
        told_at(calls, timestep)
        if not torch.equal(sample.float(), self.handed.float()):
            raise Unsupported(
                "something changed the latents between two steps (a callback, or inpainting that blends them); "
                "a search cannot take that into account"
            )
        rule = known.rules.get(calls[0].denoiser)
        outputs = [output.to(model_output.dtype) for output in known.outputs(calls)]
        if rule is None or not torch.equal(rule.combine(outputs), model_output[: self.samples]):
            raise Unsupported(
                f"{type(self.pipeline).__name__} changes its guidance between steps (dynamic guidance, or guidance for "
                "an interval); a search needs the same at every step"
            )

    def _numbers(self) -> list[float]:
        """The numbers that this call knows under names of guidance."""
        defaults = {name: value.default for name, value in inspect.signature(self.plain).parameters.items()}
        given = {**defaults, **self.arguments}
        numbers = [value for name, value in given.items() if "guidance" in name or "cfg" in name]
        numbers.append(getattr(self.pipeline, "guidance_scale", None))
        return [number for number in numbers if isinstance(number, int | float) and not isinstance(number, bool)]

    # the searches

    def _begin(self) -> None:
        assert self.conditions is not None
        for row in range(self.samples):
            ledger = Ledger({} if self.search.limit is None else {"denoiser_rows": self.search.limit})
            host = PipelineHost(
                conditions=self.conditions,
                row=row,
                seed=self.seeds[row],
                prompt=self.prompts[row],
                prepare=functools.partial(self.tail.initial, row=row, like=self.conditions.latents),
                generator=self.generators[row],
                decode=self.decode,
                reward=self.reward,
                ledger=ledger,
            )
            problem = Problem(host, ledger, self.search.rows_per_call)
            self.problems.append(problem)
            self.rounds.append(self.search.search(problem))

    def _work(self, row: int, due: float) -> None:
        """Lets the search of one sample work on until it has done its share, or is stopped, and has found something."""
        while self.finalists[row] is None and (
            self.problems[row].best_latents is None or (self.progress[row] < due and not self.stopped.is_set())
        ):
            try:
                self.progress[row] = next(self.rounds[row])
            except StopIteration as end:
                self.finalists[row] = finalists = end.value
                if self.search.pictures:
                    host: Any = self.problems[row].host
                    pictures = host.pictures(finalists.latents[: self.search.pictures])
                    self.report.details.setdefault("pictures", []).append(pictures.cpu())

    def decode(self, latents: Tensor) -> Tensor:
        with self.tap.listening(True):
            return super().decode(latents)

    def _best(self, row: int) -> Tensor:
        """The latents to hand on: the winner's, or the best so far."""
        assert self.conditions is not None
        finalists, best = self.finalists[row], self.problems[row].best_latents
        if finalists is not None:
            return finalists.latents[:1]
        return self.conditions.latents[row : row + 1].float() if best is None else best

    def _rewind(self, row: int) -> None:
        """Leaves the generator where the winner's own run would, for pipelines that add noise when they decode."""
        host: Any = self.problems[row].host
        finalists = self.finalists[row]
        trail = self.problems[row].best_trail if finalists is None else finalists.trails[0]
        if trail is not None:
            self.generators[row].set_state(host.states_after.get(trail.chain, host.states[trail.chain]))

    def fill(self) -> None:
        """Writes the report: sums over the samples, and each sample's own search."""
        record(self.report, self.problems, self.finalists)


class _Stepped(tuple[Tensor, ...]):
    """What a scheduler's step returns: `.prev_sample`, or the first entry."""

    def __new__(cls, latents: Tensor) -> _Stepped:
        return super().__new__(cls, (latents,))

    @property
    def prev_sample(self) -> Tensor:
        return self[0]
