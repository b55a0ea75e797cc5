"""How a search reaches into a pipeline: guidance, taps, decoding, seeds."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from diffusion.best_of_n import BestOfN
from diffusion.call_arguments import generators_of
from diffusion.denoiser import Call, check_inputs, made_up, replayed, same_inputs, told_at
from diffusion.guidance import Rule, find_rule
from diffusion.tail import Tail
from mmaccel.methods import Unsupported
from tests.diffusion import tiny
from tests.diffusion.hand_made import Walk
from tests.diffusion.test_pipelines import make, searched
from tests.diffusion.tiny import brightness, call, seeded

SD = "stable-diffusion"


# guidance

RULES = [
    Rule(),
    Rule(sign=-1),
    Rule(1, 0, 4.5),
    Rule(0, 1, 4.5),
    Rule(0, 1, 4.5, sign=-1),
    Rule(1, 0, 4.5, "spread", 0.7),
    Rule(0, 1, 4.5, "length"),
    Rule(1, 0, 4.5, channels=2),
    Rule(channels=2),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(seed=st.integers(0, 1000))
def test_a_rule_is_found_from_what_it_makes(rule, seed):
    outputs = list(torch.randn(1 if rule.unconditional is None else 2, 3, 4, 5, generator=seeded(seed)))
    found = find_rule(outputs, rule.combine(outputs), [7.5, 0.7, 4.5])
    others = list(torch.randn(len(outputs), 3, 4, 5, generator=seeded(seed + 1)))
    assert torch.equal(found.combine(others), rule.combine(others))


def test_what_no_rule_makes_is_not_taken_for_one():
    outputs = list(torch.randn(2, 3, 4, 5, generator=seeded(0)))
    guided = Rule(1, 0, 4.5).combine(outputs)
    for other in (guided + 1e-4, guided * 1.001, outputs[0] * outputs[1]):
        assert find_rule(outputs, other, [4.5]) is None
    assert find_rule(outputs, guided, [4.4]) is None
    assert find_rule([*outputs, outputs[0]], guided, [4.5]) is None


# the denoiser's calls


def called(rows, passes, **inputs):
    latents = torch.arange(passes * rows).float().reshape(-1, 1)
    given = {"hidden_states": latents, "timestep": torch.full((len(latents),), 500.0), **inputs}
    return Call("transformer", given, torch.zeros_like(latents))


@given(rows=st.integers(1, 3), passes=st.integers(1, 2), copies=st.integers(1, 2), count=st.integers(1, 4))
def test_a_replayed_call_gives_every_particle_what_belongs_to_its_row(rows, passes, copies, count):
    each = [f"pass {p} row {r}" for p in range(passes) for r in range(rows)]
    embeddings = torch.arange(passes * rows * copies).reshape(-1, 1)  # copies: entries a sample, as for frames
    shapes = [[(1, 2, 2)]] * rows  # some pipelines give these once a sample, whatever the passes
    added = {"text_embeds": embeddings, "scale": 0.5}
    given = called(rows, passes, encoder_hidden_states=embeddings, txt_seq_lens=each, img_shapes=shapes, added=added)
    for row in range(rows):
        made = replayed(given, row, rows, torch.full((count, 1), -1.0), torch.full((count,), 250.0), lambda time: time)
        assert made["hidden_states"].shape == (passes * count, 1) and (made["hidden_states"] == -1).all()
        assert made["timestep"].tolist() == [250.0] * (passes * count)
        assert made["txt_seq_lens"] == [f"pass {p} row {row}" for p in range(passes) for _ in range(count)]
        assert made["img_shapes"] in ([[(1, 2, 2)]] * count, [[(1, 2, 2)]] * count * passes)
        mine = [
            (p * rows + row) * copies + entry for p in range(passes) for _ in range(count) for entry in range(copies)
        ]
        assert made["encoder_hidden_states"].flatten().tolist() == mine
        assert made["added"]["text_embeds"].flatten().tolist() == mine and made["added"]["scale"] == 0.5


def test_the_denoiser_is_told_times_as_before():
    whole = {**called(1, 2).inputs, "timestep": torch.tensor(500)}
    given = Call("unet", whole, torch.zeros(2, 1))
    latents = torch.zeros(3, 1)

    def told(times, how=lambda time: time, form=given):
        return replayed(form, 0, 1, latents, torch.tensor(times, dtype=torch.float64), how)["timestep"]

    assert told([3.0, 3.0, 3.0]).item() == 3 and told([3.0, 3.0, 3.0]).dtype == torch.int64
    assert told([1.0, 2.0, 3.0]).tolist() == [1, 2, 3, 1, 2, 3]
    assert told([1.5, 2.0, 3.0]).tolist() == [1.5, 2, 3, 1.5, 2, 3]  # between training times: no rounding
    tokens = Call("transformer", {**whole, "timestep": torch.full((2, 4), 0.5)}, torch.zeros(2, 1))
    assert told([250.0] * 3, lambda time: time / 1000, tokens).tolist() == [[0.25] * 4] * 6


@pytest.mark.parametrize(
    ("told", "later"), [(800.0, 300.0), (0.8, 0.3), (torch.tensor([0.2, 0.2]), torch.tensor([0.7, 0.7]))]
)
def test_how_the_denoiser_is_told_the_time_is_found_and_verified(told, later):
    def calls(value):
        return [Call("unet", {"sample": torch.zeros(2, 1), "timestep": value}, torch.zeros(2, 1))]

    way = told_at(calls(told), 800.0)
    assert torch.allclose(way(torch.tensor(300.0)), torch.as_tensor(later).flatten()[0])
    assert told_at(calls(later), 300.0) is way
    with pytest.raises(Unsupported, match=r"scheduler's time 300 the denoiser was told .* knows time, time / 1000"):
        told_at(calls(torch.tensor([300.0, 0.0])), 300.0)


def test_made_up_outputs_have_the_denoisers_shape():
    network = tiny.pipeline("dit").transformer
    assert made_up(torch.zeros(2, 4, 8, 8), network, 0).shape == (2, 8, 8, 8)
    assert not torch.equal(*(made_up(torch.zeros(2, 4, 8, 8), network, number) for number in (0, 1)))


def test_inputs_that_cannot_be_replayed_are_refused_by_name():
    with pytest.raises(Unsupported, match=r"'image_embeds' \(IP-Adapter\), which belongs to one trajectory"):
        check_inputs([called(1, 2, added_cond_kwargs={"image_embeds": [torch.zeros(1)]})], 1)
    with pytest.raises(Unsupported, match=r"'controlnet_block_samples' \(ControlNet\)"):
        check_inputs([called(1, 2, controlnet_block_samples=(torch.zeros(1),))], 1)
    with pytest.raises(Unsupported, match=r"'moods', which this search does not know how to repeat"):
        check_inputs([called(1, 2, moods=torch.zeros(2))], 1)
    with pytest.raises(Unsupported, match="5 rows for 2 samples"):
        check_inputs([called(5, 1)], 2)
    check_inputs([called(1, 2, guidance=torch.zeros(2), img_ids=torch.zeros(3), height=4, unused=None)], 1)


def test_inputs_that_change_between_steps_are_refused_by_name():
    first, later = (
        called(1, 1, encoder_hidden_states=torch.zeros(1, 2)),
        called(1, 1, encoder_hidden_states=torch.ones(1, 2)),
    )
    with pytest.raises(Unsupported, match="'encoder_hidden_states' changes between steps"):
        same_inputs([first], [later])
    with pytest.raises(Unsupported, match="2 times in its first step and 1 times in a later one"):
        same_inputs([first, first], [first])
    same_inputs([first], [first])


@pytest.mark.parametrize("where", ["reward", "thread"])
def test_others_see_the_denoiser_as_it_is(where):
    pipe = tiny.fresh(tiny.stable_diffusion)
    latents, text = torch.randn(1, 4, 8, 8, generator=seeded(0)), torch.randn(1, 12, 16, generator=seeded(1))
    seen = []

    def look():
        with torch.no_grad():
            seen.append(pipe.unet(latents, 5, encoder_hidden_states=text).sample)

    def reward(images, prompts, **context):
        if where == "reward":
            look()
        else:
            other = threading.Thread(target=look)
            other.start()
            other.join()
        return brightness(images, prompts)

    look()
    searched(pipe, BestOfN(reward, 2), SD)
    assert len(seen) == 2 and torch.equal(*seen)


# decoding


@pytest.mark.parametrize(
    ("case", "short"), [(SD, True), ("stable-diffusion-3", True), ("dit", True), ("flux", False), ("ltx", False)]
)
def test_decodes_go_the_short_way_where_it_is_bitwise_the_pipelines(case, short, monkeypatch):
    nested, pictures = [], []
    original, decode = Tail._nested, Tail.decode

    def counted(self, latents):
        nested.append(len(latents))
        return original(self, latents)

    def compared(self, latents, copies=1):
        pictures.append((decode(self, latents, copies), original(self, torch.cat([latents] * copies))))
        return pictures[-1][0]

    monkeypatch.setattr(Tail, "_nested", counted)
    monkeypatch.setattr(Tail, "decode", compared)
    searched(tiny.pipeline(case), BestOfN(brightness, 3, rows_per_call=1), case)
    assert len(nested) == (1 if short else 3)
    assert len(pictures) == 3 and all(torch.equal(*pair) for pair in pictures)


def test_a_pipeline_with_a_safety_checker_always_decodes_itself():
    pipe = tiny.fresh(tiny.stable_diffusion)

    def checked(image, device, dtype):
        return image * 0, [True] * len(image)

    pipe.run_safety_checker, pipe.safety_checker = checked, object()
    image, report = searched(pipe, BestOfN(brightness, 2, rows_per_call=1), SD)
    assert (image == 0).all() or (image == 0.5).all()
    assert len({finalist["reward"] for finalist in report["finalists"]}) == 1


def test_noise_that_a_pipeline_adds_when_it_decodes_is_its_own_runs():
    pipe = tiny.fresh(lambda: tiny.ltx(timestep_conditioning=True))
    more = {"decode_timestep": 0.05, "decode_noise_scale": 0.5}
    image, report = searched(pipe, BestOfN(brightness, 3), "ltx", **more)
    assert report["finalists"][0]["seed"] != 5 or report["finalists"][1]["seed"] != 5
    assert (make(pipe, "ltx", report["finalists"][0]["seed"], **more) - image).abs().max() < 1e-5
    with (
        mmaccel.applied(pipe, BestOfN(brightness, 2)),
        pytest.raises(Unsupported, match="decode_timestep differs between samples"),
    ):
        pipe(generator=seeded(1, 2), **call("ltx", prompts=2, **{**more, "decode_timestep": [0.05, 0.1]}))


def test_initial_latents_of_other_chains_are_the_pipelines_own():
    pipe = tiny.pipeline("stable-diffusion-xl")  # Euler scales its initial noise
    _, report = searched(pipe, Walk(brightness, chains=2), "stable-diffusion-xl")
    for finalist in report["finalists"]:
        assert finalist["reward"] == pytest.approx(
            float(make(pipe, "stable-diffusion-xl", finalist["seed"]).mean()), abs=1e-5
        )


# seeds


def test_a_fresh_generator_gives_its_seed_and_a_used_one_draws_another():
    fresh, used = seeded(7), seeded(7)
    torch.randn(1, generator=used)
    assert generators_of({"generator": fresh}, 1)[0] == [7]
    (drawn,), (mine,) = generators_of({"generator": used}, 1)
    assert drawn != 7 and mine.initial_seed() == drawn
    assert generators_of({"generator": fresh}, 1)[0] != [7]  # it was used by now, as the plain pipeline uses it
    torch.manual_seed(0)
    first = generators_of({}, 1)[0]
    assert first != generators_of({}, 1)[0]
    torch.manual_seed(0)
    assert generators_of({}, 1)[0] == first


def test_several_samples_have_seeds_of_their_own():
    seeds, generators = generators_of({"generator": seeded(7)}, 3)
    assert seeds[0] == 7 and len(set(seeds)) == 3
    assert [generator.initial_seed() for generator in generators] == seeds
    assert generators_of({"generator": seeded(1, 2, 3)}, 3)[0] == [1, 2, 3]
    with pytest.raises(ValueError, match="3 samples need one generator or 3; got 2"):
        generators_of({"generator": seeded(1, 2)}, 3)


def test_a_loop_with_one_generator_gives_different_images():
    pipe, generator = tiny.pipeline(SD), seeded(5)
    with mmaccel.applied(pipe, BestOfN(brightness, 2)):
        images = [pipe(generator=generator, **call(SD))[0] for _ in range(2)]
    assert not torch.equal(*images)
