"""What people do with a model, as the tests do it: talk in turns, adapt it, train it."""

import pytest
import torch

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.tiny import Prompts, build, inputs_for, token_types
from vision_tokens.laws import kept_prompt, masked_logits

PICTURES = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")


def prompt_of(family="llava", seed=0, **settings):
    return inputs_for(family, Prompts(seed=seed, **settings), build(family))


def answered(model, inputs, tokens=5, **more):
    """Greedy generation of exactly so many tokens: the tokens, their logits, and the cache behind them."""
    out = model.generate(
        **inputs, **more, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, -tokens:], torch.stack(out.logits, dim=1), out.past_key_values


def assert_beams_score_as_masked(model, family, prompts):
    """Every one of four beams scores what its own row's kept tokens give it.  The model is decorated."""
    out = model.generate(
        **inputs_for(family, prompts, model), num_beams=4, num_return_sequences=4, length_penalty=0.0,
        max_new_tokens=6, min_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for row in range(2):
        prompt = kept_prompt(model, inputs_for(family, prompts.row(row), model))
        for beam in range(4 * row, 4 * row + 4):
            tokens = out.sequences[beam : beam + 1, -6:]
            chances = masked_logits(model, prompt, tokens).log_softmax(-1).gather(-1, tokens[..., None])
            torch.testing.assert_close(chances.sum(), out.sequences_scores[beam], rtol=1e-5, atol=1e-4)


def assert_only_safetensors_are_weights(model, method, folder):
    """A file that is not there, and one of another kind, are refused.  method: makes it of a file's name."""
    with pytest.raises(Unsupported, match=r"there is no file 'nowhere'; weights= names a safetensors file"):
        mmaccel.apply(model, method("nowhere"))
    (folder / "pickled.safetensors").write_bytes(b"pickled")
    with pytest.raises(Unsupported, match=r"pickled.safetensors' is no safetensors file .*; convert it first"):
        mmaccel.apply(model, method(str(folder / "pickled.safetensors")))


def continued(family, inputs, answer, question, pixels=None):
    """The conversation so far and a new question, as a user's second turn passes it; pixels: of its picture."""
    ids = torch.cat([inputs["input_ids"], answer, question], dim=1)
    said = {name: value for name, value in inputs.items() if name not in PICTURES}
    shown = {} if pixels is None else {"pixel_values": pixels}
    return {**said, "input_ids": ids, "attention_mask": torch.ones_like(ids), **token_types(family, ids), **shown}


def with_lora(model, modules=r".*language_model.*(q_proj|v_proj)"):
    """The model, wrapped by random adapters."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)).eval()


def gradients_without_and_with_checkpointing(model, inputs):
    """What the last token's logits ask of LLaVA's projector."""
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(**inputs, use_cache=False).logits[:, -1].sum().backward()
        found.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    return found


def own(family="llava", attention="sdpa", seed=0):
    """A model that the test may change for good."""
    return build.__wrapped__(family, attention, seed)
