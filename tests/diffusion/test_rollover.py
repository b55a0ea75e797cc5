"""Rollover budget forcing is the released one where it is asked to be, and spends no row too many."""

import pytest
import torch

from diffusion.particles import Level
from diffusion.paths import VariancePreserving
from diffusion.rollover import Account, RolloverBudgetForcing, levels_below, settle
from diffusion.sampler import times_of
from tests.diffusion.gaussian import GaussianHost, diffusion_grid, linear_grid
from tests.diffusion.searching import PAPER, finished, replayed
from tests.vision_tokens.golden import load

released = pytest.mark.parametrize("name", ["rbf_run_a", "rbf_run_b", "rbf_run_c"])
SMALL = {"nfe": 60, "chains": 2, "initial": 3}


@pytest.mark.parametrize("steps", [4, 10, 20])
def test_times_are_the_released_ones(steps):
    golden, _ = load("rbf/schedules")
    times = times_of("sqrt", VariancePreserving(), linear_grid(steps))
    assert torch.allclose(1000 * times.float(), golden[f"exp_time.{steps}"], atol=1e-3)
    queries = times_of("uniform", VariancePreserving(), linear_grid(steps))
    assert torch.allclose(1000 * queries.float(), golden[f"exp_query.{steps}"], atol=1e-3)
    level = VariancePreserving().level(times[:-1])
    assert torch.allclose((level.sigma / sum(level)).float(), golden[f"vp_linear_time.{steps}"], atol=1e-5)


def test_times_never_start_noisier_than_the_pipeline():
    grid = diffusion_grid(10)
    for name in ("sqrt", "uniform", "pipeline"):
        level = VariancePreserving().level(times_of(name, VariancePreserving(), grid))
        assert torch.allclose(torch.stack(level.at(0)), torch.stack(grid.at(0)))
        assert float(level.sigma[-1]) == 0


@released
def test_accounts_are_the_released_ones(name):
    golden, _ = load(f"rbf/{name}")
    chains, steps, _, _, share = golden["config"].tolist()
    for chain, start in enumerate(golden["init_rewards"].reshape(chains, -1).max(dim=1).values.tolist()):
        account = Account(0, 0, share, start)
        for row, reward in enumerate(golden["proposal_reward"][:, chain].tolist()):
            account = settle(account, reward, share, steps - 2, explore=None)
            after = {
                "step_after": account.step,
                "budget_counter_after": account.tries + 1,
                "quota_after": account.quota,
                "best_reward_after": account.record,
                "step_best_reward_after": max(account.step_best, -1e9),
            }
            assert after == {key: float(golden[key][row, chain]) for key in after}


def golden_host(golden):
    """A host that answers each new question of a chain for noise with the next one stored for it."""
    seen = [{} for _ in range(int(golden["config"][0]))]

    def draw(key):
        asked = seen[key[1]]
        return golden["noises"][asked.setdefault(key, len(asked)), key[1]]

    target, mean, std = golden["target_mean_std"].tolist()
    steps = int(golden["config"][1])
    return GaussianHost(
        linear_grid(steps), mean=mean, std=std, target=target, initials=golden["init_noise"], draws=draw
    )


@released
@pytest.mark.parametrize("rows_per_call", [None, 2])
def test_runs_are_the_released_ones(name, rows_per_call):
    golden, _ = load(f"rbf/{name}")
    chains, _, nfe, initial, _ = golden["config"].tolist()
    host = golden_host(golden)
    search = RolloverBudgetForcing(None, nfe, chains, initial, finish=0, explore=None, until=0.0, **PAPER)
    finalists = finished(search, host.problem(nfe, rows_per_call))
    assert host.rows == int(golden["model_nfe"])
    assert torch.allclose(finalists.latents[:1], golden["final_x0"], atol=1e-5)
    assert torch.allclose(finalists.reward[:1].float(), golden["final_reward"], atol=1e-5)


def test_what_a_step_saves_goes_to_the_next():
    assert settle(Account(0, 0, 5, record=1.0), 2.0, share=5, last=8, explore=None) == Account(
        1, 0, 5 - 1 + 5, record=2.0
    )


def test_a_spent_quota_moves_on_and_keeps_the_record():
    account = Account(0, 0, 3, record=1.0)
    for reward in (0.2, 0.9):
        account = settle(account, reward, share=4, last=8, explore=None)
        assert account.step == 0
    assert settle(account, 0.5, share=4, last=8, explore=None) == Account(1, 0, 4, record=1.0)


def test_equal_is_not_above_and_the_last_transition_is_never_left():
    assert settle(Account(0, 0, 3, record=1.0), 1.0, share=3, last=8, explore=None).step == 0
    assert settle(Account(8, 2, 3, record=1.0), 2.0, share=3, last=8, explore=None).step == 8


def test_with_exploring_the_first_tries_of_a_transition_set_the_bar():
    account = Account(3, 0, 5, record=9.0)
    for reward in (0.2, 0.9, 0.5):
        account = settle(account, reward, share=4, last=8, explore=0.6)
        assert account.step == 3
    assert settle(account, 0.9, share=4, last=8, explore=0.6).tries == 4  # equal is not above
    assert settle(account, 1.0, share=4, last=8, explore=0.6) == Account(4, 0, 5 - 4 + 4, record=9.0)


def test_the_released_code_is_a_preset():
    search = RolloverBudgetForcing.preset("released-code", reward={"reward": "brightness"}, nfe=60)
    assert (search.chains, search.explore, search.until, search.finish) == (2, None, 0.0, 0)
    assert (search.times, search.diffusion, search.norm) == ("sqrt", "square", 3.0)


def test_searching_ends_where_it_is_told_to_and_the_pipeline_s_own_levels_follow():
    host = GaussianHost(linear_grid(10))
    finalists = finished(RolloverBudgetForcing(None, 60, initial=1, until=0.4), host.problem(60))
    moves = finalists.trails[0].moves
    assert [move.s > 0 for move in moves] == [True] * 6 + [False] * 4
    linear = [move.sigma / (move.alpha + move.sigma) for move in moves]
    assert linear == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], abs=1e-6)


@pytest.mark.parametrize("explore", [None, 0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("chains", [1, 2])
def test_tries_made_at_once_are_those_made_one_by_one(explore, chains, monkeypatch):
    def run():
        host = GaussianHost(linear_grid(5))
        finalists = finished(RolloverBudgetForcing(None, 100, chains, 2, explore=explore), host.problem(100))
        return host, finalists

    together, ours = run()
    monkeypatch.setattr("diffusion.rollover.undecided", lambda account, last, explore: 1)
    alone, theirs = run()
    assert ours.trails == theirs.trails and together.rows == alone.rows
    assert torch.allclose(ours.latents, theirs.latents, atol=1e-5)
    assert together.calls < alone.calls


def test_a_model_of_many_steps_is_searched_better_by_exploring():
    """Its posterior means sharpen, so that by the paper's rule every transition takes its first tries."""

    def reward(explore):
        hosts = [GaussianHost(linear_grid(10), seed=seed, shape=(16,)) for seed in range(8)]
        search = RolloverBudgetForcing(None, 150, 1, explore=explore)
        return sum(float(finished(search, host.problem(150)).reward[0]) for host in hosts) / 8

    assert reward(0.6) > reward(None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"finish": 0},
        {"explore": None},
        {"explore": 0.0},
        {"explore": 1.0},
        {"finish": 3},
        PAPER,
        {"times": "pipeline"},
        {"path": "pipeline", "eta": 1.0},
    ],
)
@pytest.mark.parametrize("guidance", [None, (2.0, 0.0)])
def test_no_row_too_many_is_spent_and_hardly_one_too_few(settings, guidance):
    nfe = 59
    host = GaussianHost(linear_grid(5), guidance=guidance)
    problem = host.problem(nfe)
    chains = 2
    finished(RolloverBudgetForcing(None, nfe, chains, 2, **settings), problem)
    assert host.rows == problem.ledger.spent["denoiser_rows"]
    assert nfe - (chains + 1) * host.rows_per_evaluation < host.rows <= nfe


def test_a_finished_sample_is_where_the_flow_ends():
    """Without noise nothing is chosen but the start, and the pipeline's own levels lead on to its own sample."""
    host = GaussianHost(linear_grid(10))
    problem = host.problem()
    search = RolloverBudgetForcing(None, **SMALL, finish=None)
    end = problem.denoise(problem.start(1, Level.of(0.3, 0.7)))
    walked = search.walked(problem, end)
    assert [round(move.sigma, 6) for move in walked.trails[0].moves] == [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    assert torch.allclose(walked.latents, host.flow(end.latents, Level.of(0.3, 0.7)), atol=0.3)
    blurred = RolloverBudgetForcing(None, **SMALL, finish=40)
    error = (blurred.walked(problem, end).latents - host.flow(end.latents, Level.of(0.3, 0.7))).abs().max()
    assert float(error) < 0.05


def test_levels_below_are_those_of_the_grid_that_are_cleaner_and_not_clean():
    grid = linear_grid(5)
    assert levels_below(grid, VariancePreserving().level(0.4)).sigma.tolist() == pytest.approx([0.6, 0.4, 0.2])
    assert len(levels_below(grid, grid.at(4)).sigma) == 0


def test_more_budget_finds_more():
    def reward(nfe):
        search = RolloverBudgetForcing(None, nfe, initial=1, path="pipeline", eta=1.0)
        hosts = [GaussianHost(linear_grid(4), seed=seed) for seed in range(6)]
        return sum(float(finished(search, host.problem(nfe)).reward[0]) for host in hosts) / 6

    assert reward(16) < reward(100)


def test_a_reward_that_is_never_a_number_still_ends_clean():
    host = GaussianHost(reward=lambda clean: torch.full((len(clean),), torch.nan))
    finalists = finished(RolloverBudgetForcing(None, **SMALL), host.problem(60))
    assert finalists.latents.isfinite().all() and (finalists.reward == -torch.inf).all()


def test_a_finalist_is_made_again_from_its_trail():
    host = GaussianHost()
    finalists = finished(RolloverBudgetForcing(None, **SMALL), host.problem(60))
    assert torch.allclose(replayed(host, finalists.trails), finalists.latents, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "guidance", "smallest"),
    [
        ({"nfe": 22, "chains": 2, "initial": 3, "until": 0.0, "finish": 0}, None, 26),
        ({"nfe": 22, "chains": 2, "initial": 3, "until": 0.0, "finish": 2}, None, 30),
        ({"nfe": 40, "chains": 2, "initial": 3, "until": 0.0, "finish": 0}, (2.0, 0.0), 52),
        ({"nfe": 12, "initial": 3}, None, 13),
    ],
)
def test_too_small_a_budget_is_refused_with_the_smallest_that_works(settings, guidance, smallest):
    host = GaussianHost(linear_grid(10), guidance=guidance)
    with pytest.raises(ValueError, match=f"nfe={settings['nfe']} leaves no try .* need nfe={smallest} or more"):
        finished(RolloverBudgetForcing(None, **settings), host.problem())
    assert host.rows == 0
    finished(RolloverBudgetForcing(None, **{**settings, "nfe": smallest}), host.problem(smallest))
    assert host.rows <= smallest


def test_one_step_is_refused():
    with pytest.raises(ValueError, match="needs at least 2 of them; got 1"):
        finished(RolloverBudgetForcing(None), GaussianHost(linear_grid(1)).problem())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nfe": 0}, "nfe, the denoiser rows to spend, is at least 1; got 0"),
        ({"chains": 0}, "chains is at least 1; got 0"),
        ({"initial": 0}, "is at least 1; None is a tenth of nfe; got 0"),
        ({"explore": 1.5}, r"explore, .* lies in \[0, 1\]; None is the paper's rule; got 1.5"),
        ({"until": 1.0}, r"until, .* is in \[0, 1\); got 1.0"),
        ({"finish": -1}, "finish, .* is at least 0"),
        ({"norm": -1.0}, "norm, which multiplies"),
        ({"path": "straight"}, "path is one of linear, vp, polynomial, pipeline; got 'straight'"),
        ({"times": "log"}, "times is one of uniform, sqrt, pipeline; got 'log'"),
        ({"diffusion": "cubic"}, "diffusion is one of ddim, square, .*; got 'cubic'"),
        ({"power": 0.5}, "power, the polynomial path's, is at least 1"),
        ({"eta": -0.1}, "eta is at least 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloverBudgetForcing(None, **settings)
