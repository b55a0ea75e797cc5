"""What a search works together with, and what it refuses, with the reason."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

import mmaccel
from diffusion.beam_search import LatentBeamSearch
from diffusion.best_of_n import BestOfN
from diffusion.problem import Problem
from mmaccel.methods import Unsupported
from tests.diffusion import tiny
from tests.diffusion.hand_made import Walk, counted
from tests.diffusion.test_pipelines import insides, make, searched
from tests.diffusion.tiny import PICTURE, brightness, seeded
from tests.diffusion.tiny.parts import unet

SD, SD3 = "stable-diffusion", "stable-diffusion-3"
NOISE = np.random.default_rng(0)
IMAGE = PIL.Image.fromarray(NOISE.integers(0, 256, (16, 16, 3), dtype=np.uint8))
MASK = PIL.Image.fromarray((np.eye(16) * 255).astype(np.uint8))
CALL = {"prompt": tiny.PROMPTS[0], "num_inference_steps": 4, "output_type": "pt"}


def beams(**settings):
    return LatentBeamSearch(brightness, beams=2, candidates=2, lookahead=2, eta=1.0, **settings)


def run(pipe, search=None, seed=5, **more):
    arguments = {**CALL, **more, "generator": seeded(seed)}
    if search is None:
        return pipe(**arguments)[0]
    with mmaccel.applied(pipe, search) as applied:
        return pipe(**arguments)[0], applied.report.to_dict()


def holds(pipe, exact=1e-4, **more):
    """Best-of-N is the plain pipeline's from its seed, our deterministic steps end where the pipeline does, and a beam
    search counts its rows right."""
    plain, before = run(pipe, **more), insides(pipe)
    image, report = run(pipe, BestOfN(brightness, 3), **more)
    assert (run(pipe, seed=report["finalists"][0]["seed"], **more) - image).abs().max() <= exact
    assert (run(pipe, Walk(brightness), **more)[0] - plain).abs().max() <= exact
    with counted(pipe) as seen:
        _, report = run(pipe, beams(), **more)
    assert report["denoiser_rows"] == seen["rows"] > 0
    assert insides(pipe) == before and torch.equal(run(pipe, **more), plain)


def refuses(pipe, why, **more):
    """Whole samples and a search within the sampling are refused, and leave nothing behind."""
    for search in (BestOfN(brightness, 2), beams()):
        kind, _, before = insides(pipe)
        with pytest.raises(Unsupported, match=why):
            run(pipe, search, **more)
        same, _, after = insides(pipe)
        assert same is kind and [part[0] for part in after] == [part[0] for part in before]
        assert all(
            "step" not in found and "forward" not in found - known
            for (_, found), (_, known) in zip(after, before, strict=True)
        )


# pictures in


@pytest.mark.parametrize(
    ("make_one", "more"),
    [
        (lambda: tiny.stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), {}),
        (lambda: tiny.stable_diffusion_3(diffusers.StableDiffusion3Img2ImgPipeline), PICTURE),
    ],
    ids=[SD, SD3],
)
def test_image_to_image_works(make_one, more):
    holds(tiny.fresh(make_one), image=IMAGE, strength=0.8, **more)


def test_image_to_image_takes_a_picture_for_every_prompt():
    pipe = tiny.fresh(lambda: tiny.stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline))
    pictures, prompts = [IMAGE, MASK.convert("RGB")], list(tiny.PROMPTS)
    with mmaccel.applied(pipe, BestOfN(brightness, 2)):
        both = pipe(**{**CALL, "prompt": prompts}, image=pictures, generator=seeded(1, 2))[0]
        alone = [
            pipe(**{**CALL, "prompt": prompt}, image=picture, generator=seeded(seed))[0]
            for prompt, picture, seed in zip(prompts, pictures, (1, 2), strict=True)
        ]
    assert (both - torch.cat(alone)).abs().max() < 1e-5


def test_inpainting_is_refused_since_it_blends_latents_or_shows_them_to_the_denoiser():
    pipe = tiny.fresh(lambda: tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline))
    refuses(pipe, "changed the latents between two steps .*inpainting", image=IMAGE, mask_image=MASK, **PICTURE)
    nine = unet(in_channels=9)
    pipe = tiny.fresh(lambda: tiny.stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=nine))
    refuses(pipe, "sees more than the latents .* masks or pictures", image=IMAGE, mask_image=MASK, **PICTURE)


def test_controlnet_is_refused_by_name():
    control = diffusers.ControlNetModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(2, 4),
    )
    pipe = tiny.fresh(
        lambda: tiny.stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=control.eval())
    )
    refuses(pipe, r"'down_block_additional_residuals' \(ControlNet\), which belongs to one trajectory", image=IMAGE)


def test_ip_adapters_are_refused_by_name():
    embeds = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1, 1, 4)]}}
    refuses(tiny.pipeline(SD3), r"'ip_adapter_image_embeds' \(IP-Adapter\)", **tiny.CASES[SD3][1], **embeds)


# guidance


@pytest.mark.parametrize(
    ("case", "more"),
    [
        (SD, {"guidance_rescale": 0.5}),
        (SD, {"guidance_scale": 1.0}),
        (SD, {"cross_attention_kwargs": {"scale": 0.5}}),
        ("stable-diffusion-xl", {"guidance_rescale": 0.5, "clip_skip": 0}),
        ("pixart-sigma", {"guidance_scale": 0.5}),
    ],
)
def test_ways_of_guidance_that_work(case, more):
    holds(tiny.pipeline(case), **{**tiny.CASES[case][1], **more})


def test_guidance_that_changes_by_step_is_refused():
    refuses(
        tiny.pipeline("cogvideox"),
        "CogVideoXPipeline changes its guidance between steps",
        **tiny.CASES["cogvideox"][1],
        use_dynamic_cfg=True,
    )
    sd3 = {**tiny.CASES[SD3][1], "skip_guidance_layers": [0]}
    refuses(tiny.pipeline(SD3), "1 times in its first step and 2 times in a later one", **sd3, num_inference_steps=20)
    always = {"skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 2.0}
    refuses(tiny.pipeline(SD3), "no known rule of guidance .* 3 outputs", **sd3, **always)


def test_perturbed_attention_guidance_is_refused():
    pipe = tiny.fresh(lambda: tiny.stable_diffusion(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"]))
    refuses(pipe, "no known rule of guidance makes what StableDiffusionPAGPipeline hands", **PICTURE)


def test_a_scheduler_that_needs_old_predictions_is_refused_when_applied():
    pipe = tiny.fresh(lambda: tiny.cogvideox(scheduler=diffusers.CogVideoXDPMScheduler()))
    why = r"CogVideoXDPMScheduler needs old_pred_original_sample, timestep_back .*\(CogVideoXDDIMScheduler\)"
    with pytest.raises(Unsupported, match=why):
        mmaccel.apply(pipe, BestOfN(brightness, 2))
    plain = make(pipe, "cogvideox")
    assert torch.equal(searched(pipe, BestOfN(brightness, 1), "cogvideox")[0], plain)  # nothing to choose


def test_a_pipeline_that_stops_early_is_refused():
    more = {**PICTURE, "denoising_end": 0.7}
    refuses(tiny.pipeline("stable-diffusion-xl"), r"took no step when asked for its last .*denoising_end", **more)


def test_times_for_every_token_work_where_they_are_alike():
    holds(tiny.fresh(lambda: tiny.wan(expand_timesteps=True)), **tiny.CASES["wan-2.1"][1])


# numbers


@pytest.mark.parametrize("case", [SD, SD3, "wan-2.1"])
def test_half_precision_pipelines_are_searched_in_float32(case, monkeypatch):
    pipe = tiny.fresh(tiny.CASES[case][0]).to(torch.bfloat16)
    kinds, score = set(), Problem.score

    def watched(self, latents, trails):
        kinds.add(latents.dtype)
        return score(self, latents, trails)

    monkeypatch.setattr(Problem, "score", watched)
    holds(pipe, exact=0.06, **tiny.CASES[case][1])
    assert kinds == {torch.float32}


def test_a_pipeline_that_upcasts_its_autoencoder_decodes_as_ever():
    pipe = tiny.fresh(tiny.stable_diffusion_xl).to(torch.float16)
    assert pipe.vae.config.force_upcast
    image, report = run(pipe, BestOfN(brightness, 3, rows_per_call=1), **PICTURE)
    assert (run(pipe, seed=report["finalists"][0]["seed"], **PICTURE) - image).abs().max() < 1e-3
    assert pipe.vae.dtype == torch.float16


# accelerators


def test_lora_works():
    from peft import LoraConfig

    pipe = tiny.fresh(tiny.stable_diffusion)
    plain = run(pipe, **PICTURE)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.equal(run(pipe, **PICTURE), plain)
    holds(pipe, **PICTURE)
    holds(pipe, **PICTURE, cross_attention_kwargs={"scale": 0.5})


def test_a_step_cache_is_refused_until_it_is_off():
    pipe = tiny.fresh(tiny.flux)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    more = tiny.CASES["flux"][1]
    why = r"the transformer of FluxPipeline has a step cache, .* call pipe\.transformer\.disable_cache\(\) before"
    refuses(pipe, why, **more)
    plain = run(pipe, **more)
    assert torch.equal(run(pipe, BestOfN(brightness, 1), **more)[0], plain)  # nothing to choose: the cache may stay
    pipe.transformer.disable_cache()
    holds(pipe, **more)


def test_group_offloading_works():
    pipe = tiny.fresh(tiny.stable_diffusion_3)
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    holds(pipe, **tiny.CASES[SD3][1])


def test_offloading_of_whole_models_is_refused_with_the_mend():
    pipe = tiny.fresh(tiny.stable_diffusion)
    pipe.enable_model_cpu_offload(device="cpu")
    why = r"StableDiffusionPipeline offloads its models .*remove_all_hooks\(\)\), or use group offloading"
    refuses(pipe, why, **PICTURE)
    pipe.remove_all_hooks()
    holds(pipe, **PICTURE)
    pipe.enable_sequential_cpu_offload(device="cpu")
    refuses(pipe, why, **PICTURE)


def test_accelerate_hooks_that_only_move_inputs_work():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = tiny.fresh(tiny.stable_diffusion)
    add_hook_to_module(pipe.unet, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    holds(pipe, **PICTURE)


def test_a_module_whose_calls_go_past_its_forward_is_tapped_where_they_go():
    pipe = tiny.fresh(tiny.stable_diffusion)
    pipe.unet._compiled_call_impl = pipe.unet._call_impl  # what `compile()` sets, without compiling
    holds(pipe, **PICTURE)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_denoiser_works(inside):
    pipe = tiny.fresh(tiny.stable_diffusion_3)
    if inside:
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    more = tiny.CASES[SD3][1]
    plain = run(pipe, **more)
    image, report = run(pipe, BestOfN(brightness, 1), **more)
    assert torch.equal(image, plain) and report["denoiser_rows"] == 8
    with counted(pipe) as seen:  # two samples at once, as rows of one shape, which is compiled once
        image, report = run(pipe, BestOfN(brightness, 2), **more)
    assert report["denoiser_rows"] == seen["rows"] == 16
    assert (run(pipe, seed=report["finalists"][0]["seed"], **more) - image).abs().max() < 1e-5
    assert torch.equal(run(pipe, **more), plain)
