"""Calls that go wrong, or are stopped: what is said, and that the pipeline is as before."""

import threading

import pytest
import torch

import mmaccel
from diffusion.beam_search import LatentBeamSearch
from diffusion.best_of_n import BestOfN
from diffusion.pipelines import stop
from diffusion.rollover import RolloverBudgetForcing
from mmaccel.methods import Unsupported
from tests.diffusion import tiny
from tests.diffusion.test_pipelines import insides, make, searched
from tests.diffusion.tiny import brightness, call, seeded

SD = "stable-diffusion"


@pytest.fixture
def pipe():
    """A pipeline that has to be, after the test, what it was."""
    found = tiny.pipeline(SD)
    plain, before = make(found, SD), insides(found)
    yield found
    assert insides(found) == before and torch.equal(make(found, SD), plain)


def beams(reward=brightness, **settings):
    return LatentBeamSearch(reward, **{"beams": 2, "candidates": 2, "lookahead": 1, "eta": 1.0, **settings})


# settings


def test_a_budget_too_small_for_one_pass_names_the_smallest(pipe):
    with pytest.raises(ValueError, match=r"nfe=3 leaves no try .* need nfe=\d+ or more"):
        searched(pipe, RolloverBudgetForcing(brightness, nfe=3), SD)


def test_nothing_to_search_with_is_refused():
    with pytest.raises(ValueError, match="n, the number of samples, is at least 1; got 0"):
        BestOfN(brightness, 0)
    with pytest.raises(ValueError, match=r"candidates, the successors of each beam, is at least 1.*0"):
        beams(candidates=0)


def test_candidates_of_a_deterministic_step_are_refused_with_the_mend(pipe):
    with pytest.raises(Unsupported, match=r"candidates of a deterministic step .*pass eta=1\.0"):
        searched(pipe, beams(eta=None), SD)


def test_a_model_in_place_of_its_pipeline_is_refused():
    with pytest.raises(
        Unsupported, match=r"decorates diffusers pipelines; got UNet2DConditionModel\. Apply it to the pipe"
    ):
        mmaccel.apply(tiny.pipeline(SD).unet, BestOfN(brightness, 2))


def test_a_pipeline_without_a_schedulers_loop_is_refused(pipe):
    scheduler, pipe.scheduler = pipe.scheduler, None
    try:
        with pytest.raises(Unsupported, match="has no scheduler with `step` and no denoiser called unet, transformer"):
            mmaccel.apply(pipe, BestOfN(brightness, 2))
    finally:
        pipe.scheduler = scheduler


def test_what_is_no_reward_is_refused_when_applied(pipe):
    with pytest.raises(ValueError, match="a reward is a Reward, a callable"):
        mmaccel.apply(pipe, BestOfN(3, 2))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rows_per_call": -1}, "rows_per_call, the most latents at once, is at least 1, or None for all; got -1"),
        ({"rows_per_call": 0}, "got 0"),
        ({"pictures": -1}, "pictures, of finalists in the report, are 0 or more; got -1"),
    ],
)
def test_rows_and_pictures_that_cannot_be_are_refused_when_applied(pipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        mmaccel.apply(pipe, BestOfN(brightness, 2, **wrong))


def test_arguments_that_the_pipeline_does_not_know_fail_as_without_a_search():
    pipe = tiny.pipeline("stable-diffusion-3")
    with mmaccel.applied(pipe, BestOfN(brightness, 2)), pytest.raises(TypeError, match="'promt'"):
        pipe(promt="four red squares")


# rewards


def test_an_error_of_the_reward_passes_through_with_a_note(pipe):
    def broken(images, prompts, **context):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full") as caught:
        searched(pipe, BestOfN(broken, 2), SD)
    assert "raised by the reward" in caught.value.__notes__[0]


def test_a_row_without_a_valid_reward_never_wins(pipe):
    def picky(images, prompts, **context):
        rewards = brightness(images, prompts)
        rewards[rewards.argmax()] = torch.nan
        return rewards

    _, plain = searched(pipe, BestOfN(brightness, 3), SD)
    _, report = searched(pipe, BestOfN(picky, 3), SD)
    assert report["invalid_rewards"] == 1
    assert report["finalists"][0]["trail"] == plain["finalists"][1]["trail"]
    assert report["finalists"][-1]["trail"] == plain["finalists"][0]["trail"]


def test_a_reward_without_any_valid_row_still_gives_a_sample(pipe):
    image, report = searched(pipe, BestOfN(lambda images, prompts, **context: [float("nan")] * len(images), 2), SD)
    assert report["invalid_rewards"] == 2
    assert (image - make(pipe, SD, report["finalists"][0]["seed"])).abs().max() < 1e-5


@pytest.mark.parametrize(
    "reward", [lambda images, prompts, **context: images.mean(), lambda images, prompts, **context: images]
)
def test_a_reward_of_the_wrong_shape_is_refused(pipe, reward):
    with pytest.raises(ValueError, match=r"has to give one real number a row, \[2\]; got the shape"):
        searched(pipe, BestOfN(reward, 2), SD)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, "list", "numpy"])
def test_a_reward_may_come_in_any_dtype(pipe, kind):
    def other(images, prompts, **context):
        rewards = brightness(images, prompts)
        return {"list": rewards.tolist, "numpy": rewards.numpy}.get(kind, lambda: rewards.to(kind))()

    _, plain = searched(pipe, BestOfN(brightness, 3), SD)
    _, report = searched(pipe, BestOfN(other, 3), SD)
    assert report["finalists"][0]["trail"] == plain["finalists"][0]["trail"]


def test_a_reward_that_calls_the_pipeline_is_told_to_have_its_own(pipe):
    def recursive(images, prompts, **context):
        return pipe(**call(SD))[0].flatten(1).mean(dim=1)

    with pytest.raises(RuntimeError, match=r"a search runs in this StableDiffusionPipeline, .* a pipeline of its own"):
        searched(pipe, BestOfN(recursive, 2), SD)


# callbacks and interrupts


@pytest.mark.parametrize(
    "search", [BestOfN(brightness, 3), beams(), RolloverBudgetForcing(brightness, nfe=40, chains=1)]
)
def test_the_users_callback_is_called_at_every_step_with_the_best_so_far(pipe, search):
    seen = []

    def callback(pipeline, number, time, inputs):
        assert pipeline is pipe
        seen.append((number, inputs["latents"].clone()))
        return inputs

    plain = make(pipe, SD, num_inference_steps=4)
    image, _ = searched(pipe, search, SD, num_inference_steps=4, callback_on_step_end=callback)
    assert [number for number, _ in seen] == [0, 1, 2, 3]
    assert all(latents.shape == seen[0][1].shape for _, latents in seen)
    latents = searched(pipe, search, SD, num_inference_steps=4, output_type="latent")[0]
    assert torch.allclose(seen[-1][1], latents) and not torch.equal(image, plain)


@pytest.mark.parametrize("how", ["pipe._interrupt", "stop"])
@pytest.mark.parametrize("search", [BestOfN(brightness, 3), beams()])
def test_an_interrupted_run_returns_the_best_so_far(pipe, search, how):
    def callback(pipeline, number, time, inputs):
        if number == 1:
            if how == "stop":
                stop(pipeline)
            else:
                pipeline._interrupt = True
        return {}

    image, report = searched(pipe, search, SD, num_inference_steps=6, callback_on_step_end=callback)
    assert float(image.mean()) == pytest.approx(report["reward"], abs=1e-5)
    if isinstance(search, LatentBeamSearch):
        full = searched(pipe, search, SD, num_inference_steps=6)[1]
        assert report["stopped"] and report["denoiser_rows"] < full["denoiser_rows"]


def test_a_callback_that_changes_the_latents_is_refused(pipe):
    def callback(pipeline, number, time, inputs):
        return {"latents": inputs["latents"] * 2}

    with pytest.raises(Unsupported, match=r"changed the latents between two steps \(a callback,"):
        searched(pipe, BestOfN(brightness, 2), SD, callback_on_step_end=callback)


def test_a_callback_that_changes_the_prompt_is_refused(pipe):
    def callback(pipeline, number, time, inputs):
        return {"prompt_embeds": inputs["prompt_embeds"] * 2}

    more = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with pytest.raises(Unsupported, match="'encoder_hidden_states' changes between steps"):
        searched(pipe, BestOfN(brightness, 2), SD, **more)


def test_a_search_can_be_stopped_from_another_thread(pipe):
    begun, stopped = threading.Event(), threading.Event()

    def slow(images, prompts, **context):
        begun.set()
        assert stopped.wait(60)
        return brightness(images, prompts)

    def stopper():
        assert begun.wait(60)
        stop(pipe)
        stopped.set()

    other = threading.Thread(target=stopper)
    other.start()
    image, report = searched(pipe, beams(slow), SD, num_inference_steps=5)
    other.join()
    assert report["stopped"] and len(report["reward_trace"]) == 1
    assert float(image.mean()) == pytest.approx(report["reward"], abs=1e-5)


def test_stopping_what_does_not_run(pipe):
    with pytest.raises(
        ValueError, match="no search is applied to this StableDiffusionPipeline; there is nothing to stop"
    ):
        stop(pipe)
    with mmaccel.applied(pipe, BestOfN(brightness, 2)):
        stop(pipe)  # before a call: that call is not stopped
        make(pipe, SD)
        assert not mmaccel.report(pipe).to_dict()["stopped"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("search", [BestOfN, beams])
def test_whatever_is_raised_leaves_the_pipeline_ready_for_the_next_call(pipe, search, kind):
    raised = []

    def once(images, prompts, **context):
        if not raised:
            raised.append(True)
            raise kind("stop")
        return brightness(images, prompts)

    expected = searched(pipe, search(brightness), SD)[0]
    before = insides(pipe)
    with mmaccel.applied(pipe, search(once)) as run:
        with pytest.raises(kind, match="stop"):
            make(pipe, SD)
        assert insides(pipe)[2] == before[2]
        assert run.report["denoiser_rows"] > 0  # what was spent is said
        assert torch.equal(make(pipe, SD), expected)


def test_a_refused_call_says_why_and_not_something_else(pipe):
    with mmaccel.applied(pipe, BestOfN(brightness, 2)) as run:
        with pytest.raises(ValueError, match="3 samples need one generator or 3; got 2"):
            pipe(**call(SD, num_images_per_prompt=3), generator=seeded(1, 2))
        assert run.report.to_dict()["searches"] == []


def test_a_second_thread_waits_for_the_first(pipe):
    entered, release, order = threading.Event(), threading.Event(), []

    def slow(images, prompts, **context):
        order.append(threading.current_thread().name)
        if len(order) == 1:
            entered.set()
            assert release.wait(60)
        return brightness(images, prompts)

    images = {}

    def work(seed):
        images[seed] = make(pipe, SD, seed)

    with mmaccel.applied(pipe, BestOfN(slow, 3, rows_per_call=1)):
        threads = [threading.Thread(target=work, args=(seed,), name=str(seed)) for seed in (1, 2)]
        threads[0].start()
        assert entered.wait(60)
        threads[1].start()
        threads[1].join(0.3)
        assert threads[1].is_alive() and set(order) == {"1"}
        release.set()
        for thread in threads:
            thread.join()
    assert order == sorted(order) and set(order) == {"1", "2"}
    for seed in (1, 2):
        assert torch.equal(images[seed], searched(pipe, BestOfN(brightness, 3, rows_per_call=1), SD, seed)[0])


def test_another_pipeline_of_the_same_class_is_left_alone(pipe):
    other = tiny.fresh(tiny.stable_diffusion)
    plain = make(other, SD)
    with mmaccel.applied(pipe, BestOfN(brightness, 2)):
        assert torch.equal(make(other, SD), plain)
