"""Decorated models in the company they keep: adapters, offloading, pipelines, assistants."""

import pytest
import torch
from PIL import Image

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.product import holds
from tests.vision_tokens.tiny import Prompts, build, inputs_for, picture
from tests.vision_tokens.usage import own, with_lora
from vision_tokens import HiRED, RandomTokens, UniformTokens
from vision_tokens.laws import generated, kept_prompt, largest_difference, masked_logits

METHOD = HiRED(budget=0.25)
ONE, TWO = Prompts(), Prompts((((96, 70),), ((64, 96),)), (7, 12))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_a_model_with_lora_keeps_the_laws(family):
    model = own(family)
    wrapped = with_lora(model, r".*(q_proj|v_proj|qkv|linear_1)")
    inputs = inputs_for(family, TWO, model)
    holds(wrapped, METHOD, inputs)
    with mmaccel.applied(wrapped, METHOD) as run:
        generated(wrapped, inputs, 1)
        assert run.report["visual_tokens"] < run.report.to_dict()["visual_tokens_dense"]
        with pytest.raises(Unsupported, match="labels for the whole prompt do not fit"):
            wrapped(**inputs, labels=inputs["input_ids"])


def test_lora_on_a_decorated_model_keeps_the_decoration():
    model = own()
    inputs = inputs_for("llava", ONE, model)
    mmaccel.apply(model, METHOD)
    wrapped = with_lora(model)
    generated(wrapped, inputs, 1)
    assert mmaccel.report(model)["visual_tokens"] == 9
    with pytest.raises(Unsupported, match=r"LlavaModel is decorated already, through an object that wraps it"):
        mmaccel.apply(wrapped, METHOD)
    mmaccel.remove(model)


# not LLaVA-NeXT: accelerate leaves its newline on the meta device when `generate` encodes, decorated or not
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_model_that_accelerate_offloads_keeps_the_laws(family):
    accelerate = pytest.importorskip("accelerate")
    model = own(family)
    inputs = inputs_for(family, TWO, model)
    with mmaccel.applied(model, METHOD):
        plain = generated(model, inputs, 4)[1]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    holds(model, METHOD, inputs)
    with mmaccel.applied(model, METHOD) as run:
        assert largest_difference(generated(model, inputs, 4)[1], plain) < 1e-6
        assert 0 < run.report["prefill_flops"] < run.report.to_dict()["prefill_flops_dense"]


def test_accelerate_hooks_may_come_and_go_while_a_method_is_applied():
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = own(), inputs_for("llava", ONE, build("llava"))
    dense = generated(model, inputs, 3)[1]
    mmaccel.apply(model, METHOD)
    cut = generated(model, inputs, 3)[1]
    for module in (model, model.model, model.model.language_model, model.model.vision_tower):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(generated(model, inputs, 3)[1], cut)
    mmaccel.remove(model)
    assert torch.equal(generated(model, inputs, 3)[1], dense)
    hooks.remove_hook_from_module(model, recurse=True)


def test_the_inner_model_cannot_be_decorated_a_second_time():
    model, inputs = build("llava"), inputs_for("llava", ONE, build("llava"))
    with mmaccel.applied(model, METHOD):
        cut = generated(model, inputs, 2)[1]
        with pytest.raises(
            Unsupported, match=r"decorated already.*call mmaccel.remove or mmaccel.apply on that object"
        ):
            mmaccel.apply(model.model, RandomTokens())
        assert torch.equal(generated(model, inputs, 2)[1], cut)


def make_processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from mmaccel.pocket.train.common import CHAT_TEMPLATE

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", "what", "is", "this", *map(str, range(90))]
    vocabulary = {**{word: number for number, word in enumerate(words)}, "<image>": 99}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
            extra_special_tokens={"image_token": "<image>"}, padding_side="left",
        ),
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def test_the_pipeline_answers_as_generate_does():
    from transformers import pipeline

    model, processor = build("llava"), make_processor()
    pixels = picture(0, 0, (60, 80, 3)).mul(60).add(128).clamp(0, 255).byte().numpy()
    chat = [
        {"role": "user", "content": [{"type": "image", "image": Image.fromarray(pixels)},
                                     {"type": "text", "text": "what is this"}]},
    ]  # fmt: skip
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with mmaccel.applied(model, METHOD) as run:
        answer = pipe(text=chat, return_full_text=False, generate_kwargs=settings)[0]["generated_text"]
        assert run.report["visual_tokens"] == 9
        batch = pipe(text=[chat, chat], return_full_text=False, generate_kwargs=settings, batch_size=2)
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens, logits = generated(model, inputs, 6)
        reference = masked_logits(model, kept_prompt(model, inputs), tokens)
    assert largest_difference(logits, reference) < 1e-5
    assert answer.strip() == processor.decode(tokens[0], skip_special_tokens=True).strip()
    assert [found[0]["generated_text"] for found in batch] == [answer, answer]


@pytest.mark.parametrize("decorated", [False, True], ids=["plain-assistant", "decorated-assistant"])
def test_assisted_generation_gives_the_greedy_tokens(decorated):
    model, assistant = build("llava"), own(seed=5)
    inputs = inputs_for("llava", ONE, model)
    if decorated:
        mmaccel.apply(assistant, UniformTokens(budget=0.5))
    with mmaccel.applied(model, METHOD):
        greedy, _ = generated(model, inputs, 12)
        assisted = model.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, assistant_model=assistant
        )
    assert torch.equal(assisted[:, -12:], greedy)


@pytest.mark.parametrize(
    "settings",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}, {"num_beams": 4, "num_beam_groups": 2}],
    ids=["contrastive", "dola", "group-beams"],
)
def test_modes_that_left_transformers_are_refused_by_it(settings):
    model, inputs = build("llava"), inputs_for("llava", ONE, build("llava"))
    with mmaccel.applied(model, METHOD), pytest.raises(ValueError, match=r"requires `trust_remote_code=True`"):
        model.generate(**inputs, max_new_tokens=4, **settings)
