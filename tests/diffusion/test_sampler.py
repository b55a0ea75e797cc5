"""Searches that steer steps share how they sample, and every search can be written down."""

import json

import pytest
import torch

from diffusion.beam_search import LatentBeamSearch
from diffusion.blockwise import CoDe
from diffusion.paths import Linear, VariancePreserving
from diffusion.rewards.pictures import Brightness
from diffusion.rollover import RolloverBudgetForcing
from diffusion.sampler import times_of
from diffusion.search_over_paths import SearchOverPaths
from diffusion.svdd import SVDD
from tests.diffusion.gaussian import DiffusionHost, GaussianHost, diffusion_grid, linear_grid
from tests.diffusion.searching import PAPER, finished, replayed


@pytest.mark.parametrize(
    "search",
    [
        LatentBeamSearch(Brightness(), 3, 2, 4, 1.0, search_range=(0.9, 0.1), reuse=False),
        SVDD(Brightness(), 1, 3, 0.5, path="linear"),
        CoDe(Brightness(), 1, 3, 4, times="pipeline", norm=2.0),
        SearchOverPaths(Brightness(), keep="per chain", ode_steps=3),
        RolloverBudgetForcing(Brightness(), 100, finish=0, path="pipeline", eta=1.0),
        RolloverBudgetForcing(Brightness(), 100, initial=7, **PAPER),
    ],
    ids=lambda search: search.name,
)
def test_a_search_is_what_its_plain_data_says(search):
    assert type(search).from_dict(json.loads(json.dumps(search.to_dict()))) == search


def test_names():
    searches = (LatentBeamSearch, SVDD, CoDe, SearchOverPaths, RolloverBudgetForcing)
    assert [search.name for search in searches] == [
        "latent-beam-search",
        "svdd",
        "code",
        "search-over-paths",
        "rollover-budget-forcing",
    ]


def test_only_a_search_of_one_sample_chooses_nothing():
    assert not LatentBeamSearch(None, 1, 1).chooses and LatentBeamSearch(None, 1, 2).chooses
    assert not SVDD(None, 1, 1).chooses and CoDe(None, 2, 1).chooses and RolloverBudgetForcing(None).chooses


def test_times_of_the_pipeline_are_as_noisy_as_its_grid():
    grid, path = diffusion_grid(7), VariancePreserving()
    level = path.level(times_of("pipeline", path, grid))
    assert torch.allclose(level.alpha / level.sigma, grid.alpha / grid.sigma)
    assert torch.allclose(times_of("pipeline", Linear(), linear_grid(7)), linear_grid(7).sigma)


def test_steps_of_chains_at_different_levels_are_each_its_own():
    sampler = SVDD(None).sampler(GaussianHost(linear_grid(6)).problem())
    together = sampler.step([3, 0, 3])
    for row, number in enumerate((3, 0, 3)):
        alone = sampler.steps[number]
        assert [float(value[row]) for value in together[:3]] == [float(value) for value in alone[:3]]
        assert torch.equal(torch.stack(together.level.at(row)), torch.stack(alone.level))


@pytest.mark.parametrize(
    "host", [GaussianHost(linear_grid(5)), DiffusionHost(diffusion_grid(5))], ids=["flow", "diffusion"]
)
@pytest.mark.parametrize("path", ["vp", "linear", "polynomial", "pipeline"])
@pytest.mark.parametrize("times", ["uniform", "sqrt", "pipeline"])
def test_every_path_leads_to_clean_samples_that_are_made_again_from_their_trails(host, path, times):
    for search in (
        SVDD(None, 2, 2, path=path, times=times, eta=1.0),
        RolloverBudgetForcing(None, 40, 2, 1, path=path, times=times, eta=1.0),
    ):
        finalists = finished(search, host.problem(40))
        assert torch.allclose(replayed(host, finalists.trails), finalists.latents, atol=1e-4)
        assert float(finalists.latents.std()) < 3 * host.std
