"""The shipped pipelines are ordinary ones, small, and draw what prompts say, often but not always."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors import safe_open

from mmaccel import pocket
from mmaccel.pocket import world
from mmaccel.pocket.train import drawing

KINDS = {
    "pocket-flow": StableDiffusion3Pipeline,
    "pocket-turbo": StableDiffusion3Pipeline,
    "pocket-ddim": StableDiffusionPipeline,
}


@pytest.fixture(scope="module")
def pipelines():
    loaded = {name: kind.from_pretrained(pocket.path(name)) for name, kind in KINDS.items()}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


def test_pipelines_are_listed_and_their_sizes_count_every_folder():
    assert set(KINDS) <= set(pocket.names())
    for name in pocket.names():
        files = [file for file in pocket.path(name).glob("**/*") if file.is_file()]
        assert pocket.size(name) == sum(len(file.read_bytes()) for file in files) > 1e6


def test_models_without_settings_of_a_call_have_none():
    assert pocket.call_defaults("pocket-clip") == {}
    assert pocket.call_defaults("pocket-flow")["num_inference_steps"] > 1


@pytest.mark.parametrize("name", KINDS)
def test_pipelines_are_small_halves_of_the_librarys_own_classes_and_load_as_floats(name, pipelines):
    assert pocket.size(name) < 12e6
    for file in pocket.path(name).glob("*/*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118 (no mapping)
    for part in pipelines[name].components.values():
        if isinstance(part, torch.nn.Module):
            assert type(part).__module__.startswith(("diffusers.", "transformers."))
            assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", KINDS)
def test_a_pipeline_survives_saving(name, pipelines, tmp_path):
    pipelines[name].save_pretrained(tmp_path)
    again = KINDS[name].from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call = {**pocket.call_defaults(name), "num_inference_steps": 2, "output_type": "latent"}
    first, second = (
        pipeline("a red circle", generator=torch.Generator().manual_seed(0), **call)[0]
        for pipeline in (pipelines[name], again)
    )
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_they_share_one_autoencoder_with_standard_latents(pipelines):
    first, *others = (pipeline.vae for pipeline in pipelines.values())
    configs = [(pocket.path(name) / "vae/config.json").read_text() for name in KINDS]
    assert len(set(configs)) == 1 and "_name_or_path" not in configs[0]
    for other in others:
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in first.state_dict().items())
    assert drawing.round_trip(first, 100) >= 0.97


def test_flow_draws_some_prompts_right_and_more_of_them_nearly(pipelines):
    shares = drawing.success(
        pipelines["pocket-flow"], 24, **{**pocket.call_defaults("pocket-flow"), "num_inference_steps": 10}
    )
    assert 0.05 <= shares["all"] <= 0.9, shares
    assert shares["score"] >= 0.5, shares


def test_the_plain_call_of_flow_draws_as_well_as_the_fast_one(pipelines):
    """Without settings, 256 empty places follow the text."""
    pipeline, prompts = pipelines["pocket-flow"], world.prompts(6)
    call = {**pocket.call_defaults("pocket-flow"), "num_inference_steps": 4}
    pictures = [drawing.draw(pipeline, prompts, **{**call, "max_sequence_length": zeros}) for zeros in (16, 256)]
    differences = np.abs(np.subtract(*(np.array(drawn, float) for drawn in pictures))).mean((1, 2, 3))
    assert np.median(differences) < 20, differences


def test_a_third_encoder_says_nothing(pipelines):
    zeros = pipelines["pocket-flow"].encode_prompt("a red circle", None, None, max_sequence_length=16)[0][0, 16:]
    assert zeros.shape == (16, 256) and not zeros.any()


def test_ddim_draws_some_prompts_right(pipelines):
    shares = drawing.success(
        pipelines["pocket-ddim"], 24, **{**pocket.call_defaults("pocket-ddim"), "num_inference_steps": 10}
    )
    assert 0.05 <= shares["all"] <= 0.9, shares
