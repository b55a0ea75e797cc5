"""The batch task `generate`: pictures and videos, by a pipeline alone or by a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmaccel.batch.tasks import Task
from mmaccel.methods import Method

OURS = ("prompt", "generator", "output_type", "num_images_per_prompt", "num_videos_per_prompt", "return_dict")


@dataclass(frozen=True, kw_only=True)
class Generate(Task):
    """Draw a picture or a video; with a search in the recipe, the best that it finds.

    call: more arguments of the pipeline's call, e.g. {"num_inference_steps": 10}.
    """

    name: ClassVar[str] = "generate"
    alike: ClassVar[tuple[str, ...]] = ("call",)
    holds: ClassVar[Literal["model", "pipeline"]] = "pipeline"
    default_model: ClassVar[str | None] = "pocket-flow"

    prompt: str
    call: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if given := [name for name in OURS if name in self.call]:
            raise ValueError(f"{given[0]} of the call is not for a job to say; one job draws one picture of one prompt")

    @classmethod
    def check(cls, methods: Sequence[Method]) -> None:
        from diffusion.search import Search

        for method in methods:
            if not isinstance(method, Search):
                raise ValueError(
                    f"{method.name} is no search of a diffusers pipeline; see `mmaccel methods`, stage denoise"
                )

    @classmethod
    def batches(cls, methods: Sequence[Method]) -> bool:
        return not methods  # a search is a batch by itself: its particles are evaluated together

    @classmethod
    def load(cls, model: Path | None, device: str) -> Any:
        from diffusion.loading import load
        from mmaccel import pocket

        assert model is not None, "this task has a default model"
        pipeline = load(model)[0].to(device)
        pipeline.set_progress_bar_config(disable=True)
        ours = model.name in pocket.names() and pocket.path(model.name) == model
        return pipeline, pocket.call_defaults(model.name) if ours else {}

    @classmethod
    def run(
        cls, host: Any, methods: Sequence[Method], jobs: Sequence[Generate], seeds: Sequence[int], stems: Sequence[Path]
    ) -> list[dict[str, Any]]:
        import torch

        from diffusion.pictures import save
        from diffusion.runs import counted_rows
        from mmaccel.api import applied
        from mmaccel.ledger import Ledger

        pipeline, defaults = host
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        several = len(jobs) > 1
        arguments = {
            **defaults,
            **jobs[0].call,
            "prompt": [job.prompt for job in jobs] if several else jobs[0].prompt,
            "generator": generators if several else generators[0],
            "output_type": "pt",
        }
        if methods:
            with applied(pipeline, *methods) as run:
                made = pipeline(**arguments)[0]
            report = run.report.to_dict(flops=False)
            spent = {name: report[name] for name in ("denoiser_rows", "decodes", "reward_calls")}
        else:
            ledger = Ledger()
            with counted_rows(pipeline, ledger):
                made = pipeline(**arguments)[0]
            report, spent = {}, {"denoiser_rows": ledger.spent.get("denoiser_rows", 0) // len(jobs)}
        for sample, stem in zip(torch.as_tensor(made), stems, strict=True):
            save(sample.float().cpu(), stem)
        return [{**report, "spent": spent} for _ in jobs]
