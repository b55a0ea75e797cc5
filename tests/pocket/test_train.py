"""The training code's laws: packing changes nothing, resuming changes nothing, targets say what the picture shows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mmaccel import pocket
from mmaccel.pocket import train, world
from mmaccel.pocket.train import (
    autoencoder,
    clip,
    common,
    ddim,
    diffusion,
    figures,
    flow,
    llava,
    llava_next,
    questions,
    turbo,
    video,
)


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return clip.make_model().eval()


@pytest.mark.parametrize("pixels", [(96, 96), (192, 192), (96, 192), (180, 130)])
def test_packed_questions_cost_what_they_cost_alone(tower, pixels):
    """The loss of several questions behind one picture is the mean over answer tokens of the library's own forward."""
    model = llava.make_model(tower).eval()
    processor = llava.make_processor()
    if pixels != (96, 96):
        model, processor = llava_next.make_model(tower, model).eval(), llava_next.make_processor()
        nn.init.normal_(model.model.image_newline)
    rng = np.random.default_rng(3)
    scene = world.sample_scene(rng, (2, 4), world.sizes_at(*pixels), pixels[1] / pixels[0])
    image, asked = world.render(scene, pixels), questions.choose(scene, rng)[:4]
    losses = []
    for question in asked:
        (prompt,) = figures.prompts(processor, [(image, question)])
        inputs = processor(images=[image], text=[f"{prompt} {question.answer}<eos>"], return_tensors="pt")
        answer = len(processor.tokenizer.encode(question.answer, add_special_tokens=False)) + 1
        with torch.no_grad():
            logits = model(**inputs).logits[0, -answer - 1 : -1]
        losses += functional.cross_entropy(logits, inputs.input_ids[0, -answer:], reduction="none").tolist()
    core = model.model
    sizes = {"image_sizes": inputs.image_sizes} if "image_sizes" in inputs else {}
    with torch.no_grad():
        visual = core.get_image_features(inputs.pixel_values, **sizes).pooler_output[0][None]
        before = core.language_model.get_input_embeddings()(torch.tensor(processor.tokenizer.encode("USER:")))
        packed = questions.pack([asked], processor.tokenizer, {})
        place = torch.arange(visual.shape[1])[None]
        together = questions.answer_loss(core.language_model, before, visual, place, packed)
    assert together.item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    def run_to(steps, folder, resume):
        torch.manual_seed(1)
        model = nn.Linear(3, 1)

        def losses_at(step):
            data = torch.from_numpy(world.train_rng(5, step).normal(size=(8, 3))).float()
            return {"error": (model(data) - data.sum(1, keepdim=True)).square().mean()}

        recipe = common.Recipe(seed=5, steps=200, warmup=10)
        stage = common.Stage("toy", recipe, losses_at, [model])
        if steps < recipe.steps:  # stop as a killed process would: the schedule knows nothing of it
            stage = replace(stage, losses_at=lambda step: losses_at(step) if step < steps else exit())
            with pytest.raises(SystemExit):
                common.fit(model, stage, folder, resume)
        else:
            common.fit(model, stage, folder, resume)
        return model.weight.detach().clone()

    unbroken = run_to(200, tmp_path / "one", True)
    run_to(130, tmp_path / "two", True)
    assert torch.equal(run_to(200, tmp_path / "two", True), unbroken)


def test_dense_targets_say_what_the_picture_shows():
    rng = world.train_rng(4)
    for _ in range(100):
        view = clip.sample_view(rng)
        assert view.image.shape == (96, 96, 3)
        things = np.unique(view.patch_class[view.patch_class > 0])
        assert {clip.CLASSES[number - 1] for number in things} <= {thing.name for thing in view.scene.things}
        assert view.share.sum() == pytest.approx(1 if len(things) else 0, abs=1e-5)
        if view.whole:
            assert view.centre.sum() == len(view.scene.things)
            named = dict(zip(clip.COUNTED, view.counts, strict=True))
            assert all(named[thing.name] >= 1 for thing in view.scene.things)
            assert sum(named[shape] for shape in world.SHAPES) == len(view.scene.things) or max(view.counts) == 3


def test_a_false_caption_is_false():
    rng = world.train_rng(6)
    for _ in range(200):
        scene = world.sample_scene(rng, (2, 4))
        true, false = clip.describe(scene, rng)
        said = world.captions(scene)
        assert true in said
        assert false not in said or false == true  # two things may exchange equal colours: the caller drops those


def test_the_tower_reads_as_the_library_does(tower):
    pixels = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        states, _ = clip.see(tower.vision_model, pixels)
        expected = tower.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(states, expected)


def test_cls_attention_is_the_librarys(tower):
    pixels = torch.rand(2, 3, 96, 96)
    eager = clip.make_model()
    eager.load_state_dict(tower.state_dict())
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        rows = clip.see(tower.vision_model, pixels)[1]
        attentions = eager.vision_model(pixels, output_attentions=True).attentions
    torch.testing.assert_close(rows[0], attentions[0][:, :, 0].mean(1))
    torch.testing.assert_close(rows[1], attentions[-2][:, :, 0].mean(1))


def test_an_unknown_model_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match=r"'pocket-gpt' cannot be trained here; pocket-clip, .*pocket-turbo, .* can"):
        train.train("pocket-gpt", tmp_path)


def test_a_false_caption_changes_what_its_kind_says():
    rng = world.train_rng(7)
    for _ in range(100):
        scene = world.sample_scene(rng, (2, 4))
        names = [thing.name for thing in scene.things]
        inventory, *relations = world.captions(scene)
        for kind, change in (("thing", 0), ("binding", 0), ("count", None)):
            if false := figures.falsehood(scene, inventory, kind, rng):
                said = list(world.read_prompt(false).names)
                assert not world.satisfies(false, scene)
                assert change is None or len(said) == len(names)
                if kind == "binding":
                    assert sorted(" ".join(said).split()) == sorted(" ".join(names).split())
        for true in relations:
            false = figures.falsehood(scene, true, "relation", rng)
            assert false is None or set(world.read_prompt(false).names) == set(world.read_prompt(true).names)
            assert figures.falsehood(scene, true, "count", rng) is None


@pytest.fixture(scope="module")
def trained(tower, tmp_path_factory):
    """Every stage of every drawing model, two steps long, and the pipelines that they write."""
    folder = tmp_path_factory.mktemp("trained")

    def run_short(name, run):
        for stage in run.stages():
            common.fit(run, replace(stage, recipe=replace(stage.recipe, steps=2)), folder / name / stage.name)
        run.save(folder / name / "weights")
        return train.load(name, folder)

    drawers = {"pocket-flow": run_short("pocket-flow", flow.Run(tower))}
    drawers["pocket-turbo"] = run_short("pocket-turbo", turbo.Run(tower, drawers["pocket-flow"]))
    drawers["pocket-ddim"] = run_short("pocket-ddim", ddim.Run(tower, drawers["pocket-flow"]))
    drawers["pocket-video"] = run_short("pocket-video", video.Run(tower, drawers["pocket-ddim"]))
    return drawers


def test_training_writes_pipelines_that_draw(trained):
    for name, frames in (("pocket-flow", ()), ("pocket-turbo", ()), ("pocket-ddim", ()), ("pocket-video", (8,))):
        call = pocket.call_defaults(name) if name in pocket.names() else {"height": 32, "width": 32, "num_frames": 8}
        drawn = trained[name]("a red circle", output_type="np", **{**call, "num_inference_steps": 1})[0]
        assert drawn.shape == (1, *frames, 32, 32, 3)


def test_a_pair_is_a_noise_and_what_the_teacher_s_own_call_makes_of_it(tower, trained):
    """By the pipeline itself, guided, and the better of two tries is kept."""
    run = turbo.Run(tower, trained["pocket-flow"])
    prompts = turbo.sample_prompts(world.train_rng(3), 2)
    _, _, noise, latents = run.pairs(world.train_rng(3), 2, zeros=4)
    sigmas = [1 - n / turbo.STEPS for n in range(turbo.STEPS)]
    drawn = trained["pocket-flow"](
        prompts, latents=noise, num_inference_steps=turbo.STEPS, sigmas=sigmas,
        guidance_scale=turbo.GUIDANCE, max_sequence_length=4, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents, drawn, atol=1e-4, rtol=1e-4)


def test_standard_latents_have_no_mean_and_unit_spread_and_decode_as_before():
    torch.manual_seed(0)
    model = autoencoder.make_model().eval()
    pictures = autoencoder.to_samples(autoencoder.sample_pictures(world.train_rng(1), 20))
    with torch.no_grad():
        before = model.decode(model.encode(pictures).latent_dist.mean).sample
        scale = autoencoder.standardise(model, pictures)
        latents = model.encode(pictures).latent_dist.mean
        torch.testing.assert_close(model.decode(latents).sample, before, atol=1e-4, rtol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents * scale).std().item() == pytest.approx(1, rel=1e-2)


def test_averaged_weights_follow_and_settle():
    averaged = diffusion.Averaged(nn.Linear(2, 1), keep=0.5)
    with torch.no_grad():
        averaged.model.weight.fill_(3.0)
    for step in range(60):
        averaged.update(step)
    torch.testing.assert_close(averaged.average.weight, averaged.model.weight)
    assert not averaged.average.weight.requires_grad


def test_words_are_added_behind_the_others():
    plain, more = common.make_tokenizer(end=True), common.make_tokenizer(end=True, more=video.WORDS)
    said = "a red circle left of two crosses"
    assert plain.encode(said) == more.encode(said)
    assert more.convert_tokens_to_ids(list(video.WORDS)) == list(range(len(plain), len(more)))
