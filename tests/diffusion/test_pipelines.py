"""The laws that a search keeps on every pipeline of the matrix, all of them tiny random models of the real classes."""

import copy

import numpy as np
import pytest
import torch

import mmaccel
from diffusion.beam_search import LatentBeamSearch
from diffusion.best_of_n import BestOfN
from diffusion.rollover import RolloverBudgetForcing
from diffusion.runs import SearchRun
from mmaccel.methods import Unsupported
from tests.diffusion import tiny
from tests.diffusion.hand_made import Walk, counted
from tests.diffusion.tiny import brightness, call, seeded

CASES = list(tiny.CASES)
VIDEOS = ("wan-2.1", "wan-2.2", "ltx", "cogvideox", "hunyuan-video", "animatediff")
ONE_A_PROMPT = ("dit", "cogvideox", "animatediff")
UNGUIDED = {case: "true_cfg_scale" if "true_cfg_scale" in tiny.CASES[case][1] else "guidance_scale" for case in CASES}
COLOURS = (1.0, 0.6, 0.3)


def beams(**settings):
    return LatentBeamSearch(**{"reward": colours, "beams": 2, "candidates": 2, "lookahead": 2, "eta": 1.0, **settings})


def rollover(**settings):
    return RolloverBudgetForcing(**{"reward": colours, "nfe": 18, "chains": 1, "initial": 1, **settings})


def best_of(n, **settings):
    return BestOfN(colours, n, **settings)


SEARCHES = {"best-of-n": lambda **given: best_of(3, **given), "beams": beams, "rollover": rollover}
BY_BEAMS = ("stable-diffusion", "stable-diffusion-xl", "flux", "sana", "wan-2.2")
BY_ROLLOVER = ("stable-diffusion-3", "flux-true-cfg", "pixart-sigma", "dit", "cogvideox")


def quick_or_slow(pairs, quick):
    """All pairs, of which `make test` runs the quick ones."""
    return [pytest.param(*pair, marks=() if quick(*pair) else pytest.mark.slow) for pair in pairs]


def first(case, name):
    return name == ("beams" if case in BY_BEAMS else "rollover" if case in BY_ROLLOVER else "best-of-n")


FULL = quick_or_slow([(case, name) for case in CASES for name in SEARCHES], first)
KINDS = ["np", "pil", "latent"]
OUTPUTS = quick_or_slow(
    [(case, kind) for case in CASES for kind in KINDS if (case, kind) != ("dit", "latent")],  # DiT always decodes
    lambda case, kind: KINDS[CASES.index(case) % 3] == kind,
)
GUIDED = quick_or_slow(
    [(case, guided) for case in CASES for guided in (True, False)],
    lambda case, guided: guided or case in ("stable-diffusion", "qwen-image", "dit", "wan-2.2"),
)
REMOVED = quick_or_slow([(case,) for case in CASES], lambda case: case in ("stable-diffusion-3", "dit", "wan-2.2"))
AGAIN = quick_or_slow(
    [(case, name) for case in CASES for name in SEARCHES], lambda *pair: first(*pair) and pair[1] != "best-of-n"
)
SEVERAL = quick_or_slow(
    [(case,) for case in CASES if case not in ONE_A_PROMPT],
    lambda case: case in ("stable-diffusion-xl", "stable-diffusion-3", "flux", "qwen-image", "wan-2.1"),
)
every_search = pytest.mark.parametrize(("case", "name"), FULL)
every_pipeline = pytest.mark.parametrize("case", CASES)


def colours(images, prompts, **context):
    """A reward that tells samples well apart."""
    weights = torch.tensor(COLOURS).reshape(3, 1, 1) * torch.linspace(0.2, 1, images.shape[-1])
    return (images * weights).flatten(1).mean(dim=1)


def make(pipe, case, seed=5, **more):
    return pipe(generator=seeded(seed), **call(case, **more))[0]


def searched(pipe, search, case, seed=5, **more):
    with mmaccel.applied(pipe, search) as run:
        return make(pipe, case, seed, **more), run.report.to_dict()


def insides(pipe):
    """What a search must give back: attributes of the pipeline, its scheduler and its denoisers."""
    parts = [pipe.scheduler, *(getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))]
    return type(pipe), set(vars(pipe)), [(type(part), set(vars(part))) for part in parts if part is not None]


@every_pipeline
def test_nothing_to_choose_is_bitwise_the_plain_pipeline(case):
    pipe = tiny.pipeline(case)
    plain, before = make(pipe, case), insides(pipe)
    for search in (best_of(1), beams(beams=1, candidates=1)):
        image, report = searched(pipe, search, case)
        assert torch.equal(image, plain)
        assert report["denoiser_rows"] == report["denoiser_rows_dense"] > 0
    assert insides(pipe) == before


@every_pipeline
def test_the_plain_pipeline_makes_every_finalist_of_best_of_n_from_its_seed(case):
    pipe = tiny.pipeline(case)
    plain, before = make(pipe, case), insides(pipe)
    image, report = searched(pipe, best_of(3), case)
    assert insides(pipe) == before and torch.equal(make(pipe, case), plain)
    assert {finalist["plain"] for finalist in report["finalists"]} == {True} and len(report["finalists"]) == 3
    again = [make(pipe, case, finalist["seed"]) for finalist in report["finalists"]]
    assert (again[0] - image).abs().max() < 1e-5
    rewards = [finalist["reward"] for finalist in report["finalists"]]
    assert rewards == sorted(rewards, reverse=True)
    assert np.allclose(rewards, [float(colours(found, None)) for found in again], atol=1e-5)


@pytest.mark.parametrize(("case", "guided"), GUIDED)
def test_deterministic_steps_end_where_the_pipelines_do_and_decode_as_it_does(case, guided, monkeypatch):
    pictures, decode = [], SearchRun.decode

    def kept(self, latents):
        pictures.append(decode(self, latents))
        return pictures[-1]

    monkeypatch.setattr(SearchRun, "decode", kept)
    pipe = tiny.pipeline(case)
    more = {} if guided else {UNGUIDED[case]: 1.0}
    plain = make(pipe, case, num_inference_steps=4, **more)
    image, report = searched(pipe, Walk(colours), case, num_inference_steps=4, **more)
    assert (image - plain).abs().max() < 1e-4
    assert torch.equal(image, pictures[0].to(image)) and pictures[0].dtype == torch.float32
    assert pictures[0].min() >= 0 and pictures[0].max() <= 1 and pictures[0].shape[-3] == 3
    single = case in ("flux", "hunyuan-video") or not guided
    assert report["denoiser_rows"] == (4 if single else 8) == report["denoiser_rows_dense"]


@every_search
def test_the_ledger_counts_exactly_the_rows_that_went_through_the_denoiser(case, name):
    pipe = tiny.pipeline(case)
    with counted(pipe) as seen:
        _, report = searched(pipe, SEARCHES[name](), case)
    assert report["denoiser_rows"] == seen["rows"] > 0
    if name == "rollover":
        assert report["denoiser_rows"] <= 18


@pytest.mark.parametrize(("case", "name"), AGAIN)
def test_the_same_seed_gives_the_same_whatever_ran_before(case, name):
    pipe = tiny.pipeline(case)
    image, report = searched(pipe, SEARCHES[name](), case)
    torch.randn(7)
    with mmaccel.applied(pipe, SEARCHES[name]()) as run:
        make(pipe, case, seed=6)
        second = make(pipe, case)
        again = run.report.to_dict()
    assert torch.equal(image, second)
    assert again["reward_trace"] == report["reward_trace"] and again["finalists"] == report["finalists"]


@every_search
def test_rows_grouped_differently_give_the_same_selection(case, name):
    pipe = tiny.pipeline(case)
    image, report = searched(pipe, SEARCHES[name](), case)
    for rows in (1, 2):
        other, grouped = searched(pipe, SEARCHES[name](rows_per_call=rows), case)
        assert [found["trail"] for found in grouped["finalists"]] == [found["trail"] for found in report["finalists"]]
        assert (other - image).abs().max() < 1e-5


@every_search
def test_several_prompts_at_once_equal_one_by_one(case, name):
    pipe = tiny.pipeline(case)
    arguments = call(case, prompts=2)
    with mmaccel.applied(pipe, SEARCHES[name]()) as run:
        together = pipe(generator=seeded(3, 4), **arguments)[0]
        found = run.report.to_dict()["searches"]
        key = "class_labels" if case == "dit" else "prompt"
        for row, seed in enumerate((3, 4)):
            mine = {name: value[row] if isinstance(value, list) else value for name, value in arguments.items()}
            mine |= {key: [arguments[key][row]]}
            mine |= {"negative_prompt": [mine["negative_prompt"]]} if "negative_prompt" in mine else {}
            alone = pipe(generator=seeded(seed), **mine)[0]
            report = run.report.to_dict()
            assert (together[row] - alone[0]).abs().max() < 1e-4
            assert [one["trail"] for one in report["finalists"]] == [one["trail"] for one in found[row]["finalists"]]
            assert found[row]["seed"] == seed


@pytest.mark.parametrize("case", SEVERAL)
def test_several_samples_of_a_prompt_are_several_searches(case):
    pipe = tiny.pipeline(case)
    kind = "videos" if case in VIDEOS else "images"
    with mmaccel.applied(pipe, best_of(2)) as run:
        both = pipe(generator=seeded(3, 4), **call(case), **{f"num_{kind}_per_prompt": 2})[0]
        alone = [make(pipe, case, seed) for seed in (3, 4)]
        pipe(generator=seeded(3), **call(case), **{f"num_{kind}_per_prompt": 2})
        searches = run.report.to_dict()["searches"]
    assert all((both[row] - one[0]).abs().max() < 1e-5 for row, one in enumerate(alone))
    assert searches[0]["seed"] == 3 != searches[1]["seed"]  # samples without a generator of theirs derive their seeds


@pytest.mark.parametrize("case", ["cogvideox", "animatediff"])
def test_a_pipeline_that_makes_one_video_a_prompt_is_not_asked_for_more(case):
    pipe = tiny.pipeline(case)
    with (
        mmaccel.applied(pipe, best_of(2)),
        pytest.raises(Unsupported, match=r"asked for 2 .* makes 1.* list of prompts"),
    ):
        make(pipe, case, num_videos_per_prompt=2)


@pytest.mark.parametrize(("case", "kind"), OUTPUTS)
def test_every_output_type_says_the_same(case, kind):
    pipe = tiny.pipeline(case)
    image, report = searched(pipe, best_of(2), case, output_type=kind)
    plain = make(pipe, case, report["finalists"][0]["seed"], output_type=kind)
    if kind == "pil":
        flat = [frame for video in image for frame in video] if case in VIDEOS else image
        same = [frame for video in plain for frame in video] if case in VIDEOS else plain
        for first, second in zip(flat, same, strict=True):
            assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
    else:
        assert np.allclose(image, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", REMOVED)
def test_removing_restores_the_pipeline(case):
    pipe = tiny.pipeline(case)
    plain, before = make(pipe, case), insides(pipe)
    configuration = copy.deepcopy(dict(pipe.scheduler.config))
    mmaccel.apply(pipe, SEARCHES["best-of-n"]())
    assert isinstance(pipe, before[0]) and type(pipe).__name__ == before[0].__name__
    make(pipe, case)
    mmaccel.remove(pipe)
    assert insides(pipe) == before and dict(pipe.scheduler.config) == configuration
    assert torch.equal(make(pipe, case), plain)


def test_a_video_rewards_frames_come_before_the_channels():
    pipe, shapes = tiny.pipeline("wan-2.1"), []

    def watching(images, prompts, **context):
        shapes.append(list(images.shape))
        return brightness(images, prompts)

    searched(pipe, BestOfN(watching, 2), "wan-2.1")
    assert shapes == [[2, 3, 3, 16, 16]]


def test_prompts_reach_the_reward_and_are_none_where_there_are_none():
    seen = []

    def watching(images, prompts, **context):
        seen.append(prompts)
        return brightness(images, prompts)

    searched(tiny.pipeline("stable-diffusion"), BestOfN(watching, 2), "stable-diffusion")
    searched(tiny.pipeline("dit"), BestOfN(watching, 2), "dit")
    assert seen == [[tiny.PROMPTS[0]] * 2, [None] * 2]
