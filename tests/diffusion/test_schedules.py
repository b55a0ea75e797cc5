"""Our steps are those of diffusers' schedulers, or a scheduler is refused by name."""

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from diffusion.beam_search import LatentBeamSearch
from diffusion.best_of_n import BestOfN
from diffusion.particles import weighted
from diffusion.schedules import IN_LOOP, check_scheduler, schedule_of
from diffusion.steps import ddim, ode
from mmaccel.methods import Unsupported
from tests.diffusion import tiny
from tests.diffusion.test_pipelines import insides, make, searched
from tests.diffusion.tiny import brightness, seeded

SD = "stable-diffusion"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OWN = {**BETAS, "clip_sample": False}
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
DETERMINISTIC = [
    *(
        ("DDIMScheduler", {**OWN, "timestep_spacing": spacing, "prediction_type": prediction, **more})
        for spacing in SPACINGS[:2]  # linspace: see below
        for prediction in PREDICTIONS
        for more in ({}, {"set_alpha_to_one": False, "steps_offset": 1})
    ),
    ("DDIMScheduler", {**OWN, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {**OWN, "trained_betas": [0.01] * 1000}),
    *(("CogVideoXDDIMScheduler", {"prediction_type": prediction}) for prediction in PREDICTIONS),
    (
        "CogVideoXDDIMScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ),
    *(
        ("EulerDiscreteScheduler", {"timestep_spacing": spacing, "prediction_type": prediction})
        for spacing in SPACINGS
        for prediction in PREDICTIONS[:2]
    ),
    *(
        ("EulerDiscreteScheduler", more)
        for more in (
            {"use_karras_sigmas": True},
            {"use_exponential_sigmas": True},
            {"use_beta_sigmas": True},
            {"interpolation_type": "log_linear"},
            {"final_sigmas_type": "sigma_min"},
            {"prediction_type": "sample"},
        )
    ),
    *(
        ("FlowMatchEulerDiscreteScheduler", more)
        for more in (
            {},
            {"shift": 3.0},
            {"use_karras_sigmas": True},
            {"use_beta_sigmas": True},
            {"use_dynamic_shifting": True},
            {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
        )
    ),
]


def prepared(name, settings, steps=5):
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(steps, **({"mu": 0.8} if settings.get("use_dynamic_shifting") else {}))
    return scheduler


def walked(scheduler, number, seed=0, step=None):
    """(ours, the scheduler's) latents after its step `number`, from the same latents and denoiser output."""
    schedule = schedule_of(scheduler)
    latents, output = torch.randn(2, 2, 4, 4, generator=seeded(seed)).double()
    now, to, time = (
        schedule.grid.at([number]).rows(2),
        schedule.grid.at([number + 1]).rows(2),
        scheduler.timesteps[number],
    )
    latents = latents * float(torch.hypot(*schedule.grid.at(number)))
    if hasattr(scheduler, "scale_model_input"):
        scale, seen = schedule.network_level(now)
        assert torch.allclose(scheduler.scale_model_input(latents, time), weighted(1 / scale, latents), atol=1e-5)
        assert schedule.time(seen.sigma).tolist() == [float(time)] * 2
    scale, seen = schedule.network_level(now)
    x0, eps = schedule.estimates(weighted(1 / scale, latents), seen, output)
    assert torch.allclose(weighted(now.alpha, x0) + weighted(now.sigma, eps), latents, atol=1e-5)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = number
    theirs = scheduler.step(output, time, latents, generator=seeded(3), return_dict=False)[0]
    p, q, s, _ = step(now, to) if step else ode(to)
    noise = torch.randn(latents.shape, generator=seeded(3), dtype=latents.dtype)
    return weighted(p, x0) + weighted(q, eps) + weighted(s, noise), theirs


@pytest.mark.parametrize(("name", "settings"), DETERMINISTIC)
def test_a_deterministic_step_of_ours_is_the_schedulers(name, settings):
    for number in range(5):
        if settings.get("rescale_betas_zero_snr") and number == 0 and settings["prediction_type"] != "v_prediction":
            continue
        ours, theirs = walked(prepared(name, settings), number)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_noisy_step_of_ours_with_eta_one_is_the_schedulers(name):
    settings = {"clip_sample": False} if name == "DDPMScheduler" else {}
    for number in range(4):  # the last steps end clean, without noise
        ours, theirs = walked(prepared(name, settings), number, step=lambda now, to: ddim(now, to, 1.0))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_ddim_steps_go_where_the_next_evaluation_is_even_where_the_scheduler_steps_past_it():
    scheduler = prepared("DDIMScheduler", {**OWN, "timestep_spacing": "linspace"})
    times, table = scheduler.timesteps, scheduler.alphas_cumprod.double()
    grid = schedule_of(scheduler).grid
    assert torch.allclose(grid.sigma[:-1].square(), 1 - table[times])
    assert times[1] != times[0] - 1000 // 5  # where its own first step leads


def test_a_clipped_estimate_comes_with_the_noise_that_leads_there():
    schedule = schedule_of(prepared("DDIMScheduler", {**OWN, "clip_sample": True, "clip_sample_range": 0.5}))
    latents, output = torch.randn(2, 3, 4, generator=seeded(0))
    level = schedule.grid.at([1, 2, 3])
    x0, eps = schedule.estimates(latents, level, output)
    assert x0.abs().max() == 0.5
    assert torch.allclose(weighted(level.alpha, x0) + weighted(level.sigma, eps), latents, atol=1e-6)


@given(noise=st.floats(0.05, 0.95))
def test_times_between_the_grids_are_those_of_the_training(noise):
    level = torch.tensor([noise], dtype=torch.float64)
    flow, diffusion = (schedule_of(prepared(*each)) for each in (DETERMINISTIC[-1], DETERMINISTIC[0]))
    assert flow.time(level).item() == pytest.approx(1000 * noise)
    time = diffusion.time(level).item()
    low, high = diffusion.table[int(time)], diffusion.table[min(int(time) + 1, 999)]
    assert low - 1e-9 <= noise <= high + 1e-9 or time == 0


def test_a_lookahead_descends_to_clean_by_the_paths_own_times():
    diffusion = schedule_of(prepared(*DETERMINISTIC[0]))
    levels = diffusion.below(diffusion.grid.at(1), 4)
    assert torch.allclose(levels.sigma[0], diffusion.grid.sigma[1]) and (levels.sigma.diff() < 0).all()
    start = int(diffusion.times[1])
    assert torch.allclose(levels.sigma, diffusion.table[[start * j // 4 for j in (4, 3, 2, 1)]])
    flow = schedule_of(prepared("FlowMatchEulerDiscreteScheduler", {}))
    levels = flow.below(flow.grid.at(1), 4)
    assert torch.allclose(levels.sigma, flow.grid.sigma[1] * torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))


OTHERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler")


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_with_history_draw_whole_samples_and_refuse_the_rest(name):
    pipe = tiny.fresh(lambda: tiny.stable_diffusion(scheduler=getattr(diffusers, name)(**BETAS, steps_offset=1)))
    image, report = searched(pipe, BestOfN(brightness, 2), SD, num_inference_steps=4)
    again = make(pipe, SD, report["finalists"][0]["seed"], num_inference_steps=4)
    assert (image - again).abs().max() < 1e-5
    before = insides(pipe)
    search = LatentBeamSearch(brightness, beams=2, candidates=2, eta=1.0)
    mend = rf"{name} remembers .* needs one of .*pipe\.scheduler = DDIMScheduler\.from_config.*BestOfN"
    with pytest.raises(Unsupported, match=mend):
        mmaccel.apply(pipe, search)
    assert insides(pipe) == before
    pipe.scheduler, own = diffusers.DDIMScheduler.from_config(pipe.scheduler.config), pipe.scheduler
    with mmaccel.applied(pipe, search):
        make(pipe, SD)
        pipe.scheduler = own  # after it was applied
        with pytest.raises(Unsupported, match=mend):
            make(pipe, SD)


def test_flow_schedulers_with_history_are_sent_to_euler():
    with pytest.raises(Unsupported, match=r"pipe\.scheduler = FlowMatchEulerDiscreteScheduler\.from_config"):
        check_scheduler(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {"thresholding": True}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        ("DDPMScheduler", {"variance_type": "learned_range"}),
        ("DDIMScheduler", {"prediction_type": "dream"}),
    ],
)
def test_settings_that_are_not_reproduced_are_refused_by_name(name, settings):
    ((setting, value),) = settings.items()
    with pytest.raises(Unsupported, match=rf"{name} with {setting}={value!r}.*"):
        check_scheduler(getattr(diffusers, name)(**settings))


def test_every_scheduler_of_the_table_exists():
    assert all(hasattr(diffusers, name) for name in IN_LOOP)


@pytest.mark.parametrize(
    ("name", "eta"), [("DDPMScheduler", 1.0), ("EulerAncestralDiscreteScheduler", 1.0), ("DDIMScheduler", 0.6)]
)
def test_a_search_adds_as_much_noise_as_the_pipeline_unless_told(name, eta):
    settings = {**BETAS, "steps_offset": 1, **({} if "Euler" in name else {"clip_sample": False})}
    pipe = tiny.fresh(lambda: tiny.stable_diffusion(scheduler=getattr(diffusers, name)(**settings)))
    more = {"eta": eta} if name == "DDIMScheduler" else {}
    search = LatentBeamSearch(brightness, beams=1, candidates=2, lookahead=1)
    image, _ = searched(pipe, search, SD, **more)
    told, _ = searched(pipe, LatentBeamSearch(brightness, beams=1, candidates=2, lookahead=1, eta=eta), SD, **more)
    assert torch.equal(image, told)
