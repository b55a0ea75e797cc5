"""What people do with a model, as the tests do it: talk in turns, adapt it, train it."""

import pytest
import torch

from tests.vision_tokens.tiny import Prompts, build, inputs_for, token_types

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
