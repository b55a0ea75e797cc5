"""The batch task `generate` draws what the same calls of the pipeline draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import mmaccel
from diffusion.best_of_n import BestOfN
from diffusion.tasks import Generate
from tests.diffusion.tiny import fresh, stable_diffusion_3

CALL = {"height": 16, "width": 16, "max_sequence_length": 12, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd3"
    fresh(stable_diffusion_3).save_pretrained(folder)
    return Generate.load(folder, "cpu")


def ran(host, methods, tmp_path, *prompts):
    jobs = [Generate(prompt=prompt, call=CALL) for prompt in prompts]
    stems = [tmp_path / str(place) for place in range(len(jobs))]
    return Generate.run(host, methods, jobs, list(range(5, 5 + len(jobs))), stems)


def pixels(drawn):
    return (drawn.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def test_a_batch_of_prompts_is_one_call_with_a_seed_each(host, tmp_path):
    reports = ran(host, [], tmp_path, "a red square", "two circles")
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    drawn = host[0](["a red square", "two circles"], generator=generators, output_type="pt", **CALL)[0]
    for place in range(2):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{place}.png")), pixels(drawn[place]))
    assert [report["spent"] for report in reports] == [{"denoiser_rows": 2 * 2}] * 2  # guidance doubles two steps


def test_a_search_is_a_batch_of_its_own_and_its_report_comes_along(host, tmp_path):
    search = BestOfN(n=2, reward="brightness")
    assert not Generate.batches([search]) and Generate.batches([])
    (report,) = ran(host, [search], tmp_path, "a red square")
    with mmaccel.applied(host[0], search):
        drawn = host[0]("a red square", generator=torch.Generator().manual_seed(5), output_type="pt", **CALL)[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0.png")), pixels(drawn[0]))
    assert report["spent"] == {"denoiser_rows": 8, "decodes": 2, "reward_calls": 2} and len(report["finalists"]) == 2


def test_a_pocket_pipeline_is_called_with_what_suits_it():
    from mmaccel import pocket

    assert Generate.load(pocket.path("pocket-flow"), "cpu")[1] == pocket.call_defaults("pocket-flow")
