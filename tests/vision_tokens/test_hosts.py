"""Decorated models in the company they keep: wrappers, pipelines, other precisions, threads, training, odd images."""

import copy
import itertools
import sys
import threading

import pytest
import torch
from PIL import Image

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.product import case
from tests.vision_tokens.test_families import METHODS, works
from tests.vision_tokens.tiny import FAMILIES, PINPOINTS, TEXT, Prompts, build, inputs_for, picture
from vision_tokens import FourierVLM, HiRED, ImageView, Layout, PooledTokens, RandomTokens, UniformTokens
from vision_tokens.families import find_host
from vision_tokens.kept_columns import KeptColumns
from vision_tokens.laws import (
    fingerprint,
    generated,
    kept_prompt,
    language_input_laws,
    largest_difference,
    masked_logits,
)

METHOD = HiRED(budget=0.25)
ATTENTIVE = [family for family in FAMILIES if works(METHOD, family)]
ONE, TWO = Prompts(), Prompts((((96, 70),), ((64, 96),)), (7, 12))


def working(*methods):
    """These methods with the families that they work on."""
    return [case(method, family, slow=False) for method in methods for family in ATTENTIVE if works(method, family)]


def own(family="llava", attention="sdpa", seed=0):
    """A model that the test may change for good."""
    return build.__wrapped__(family, attention, seed)


def holds(model, method, inputs, tokens=4):
    laws = list(language_input_laws(model, method, inputs, tokens))
    assert all(law.passed for law in laws), "\n".join(map(str, laws))


# Wrappers


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_a_model_with_lora_keeps_the_laws(family):
    peft = pytest.importorskip("peft")
    model = own(family)
    config = peft.LoraConfig(r=4, target_modules=r".*(q_proj|v_proj|qkv|linear_1)", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    inputs = inputs_for(family, TWO, model)
    holds(wrapped, METHOD, inputs)
    with mmaccel.applied(wrapped, METHOD) as run:
        generated(wrapped, inputs, 1)
        assert run.report["visual_tokens"] < run.report.to_dict()["visual_tokens_dense"]
        with pytest.raises(Unsupported, match="labels for the whole prompt do not fit"):
            wrapped(**inputs, labels=inputs["input_ids"])


def test_lora_on_a_decorated_model_keeps_the_decoration():
    peft = pytest.importorskip("peft")
    model = own()
    inputs = inputs_for("llava", ONE, model)
    mmaccel.apply(model, METHOD)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
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


# Precisions, and what can be asked of a forward


@pytest.mark.parametrize(("method", "family"), working(METHOD, FourierVLM(budget=0.25)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_laws(family, dtype, method):
    model = own(family).to(dtype)
    inputs = inputs_for(family, TWO, model)
    holds(model, method, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})


@pytest.mark.parametrize("family", ATTENTIVE)
def test_generation_without_a_cache_gives_the_same(family):
    model = build(family)
    inputs = inputs_for(family, TWO, model)
    with mmaccel.applied(model, METHOD):
        _, cached = generated(model, inputs, 5)
        _, anew = generated(model, {**inputs, "use_cache": False}, 5)
    assert largest_difference(cached, anew) < 1e-5


def test_hidden_states_and_attentions_are_those_of_the_kept_tokens():
    model = build("llava", "eager")
    inputs = inputs_for("llava", ONE, model)
    held = inputs["input_ids"].shape[1] - 27
    with mmaccel.applied(model, METHOD), torch.no_grad():
        bare = model(**inputs).logits
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        run = model.generate(
            **inputs, max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    assert torch.equal(out.logits, bare)
    assert [state.shape for state in out.hidden_states] == [(1, held, 32)] * 3
    assert [rows.shape for rows in out.attentions] == [(1, 4, held, held)] * 2
    assert [step[0].shape[-1] for step in run.attentions] == [held, held + 1]


def test_places_in_the_prompt_cannot_index_the_logits_of_the_kept():
    model, inputs = build("llava"), inputs_for("llava", ONE, build("llava"))
    with mmaccel.applied(model, METHOD):
        with pytest.raises(Unsupported, match=r"places in the prompt do not index its logits; pass logits_to_keep as"):
            model(**inputs, logits_to_keep=torch.tensor([3]))
        assert model(**inputs, logits_to_keep=2).logits.shape[1] == 2


def test_features_come_as_a_tuple_to_whom_asks_for_one():
    model = build("llava")
    pixels = inputs_for("llava", ONE, model)["pixel_values"]
    dense = model.model.get_image_features(pixels, return_dict=False)
    with mmaccel.applied(model, METHOD):
        given = model.model.get_image_features(pixels, return_dict=False)
    assert len(given) == len(dense) and torch.equal(given[0], dense[0])


def test_an_encoder_that_changed_since_apply_is_refused():
    model, inputs = own(), inputs_for("llava", ONE, build("llava"))
    with mmaccel.applied(model, METHOD):
        with pytest.raises(Unsupported, match=r"with vision_feature_layer -2; this call asks for -1. Set model.config"):
            model(**inputs, vision_feature_layer=-1)
        cut = model(**inputs).logits
        model.set_attn_implementation("eager")
        with pytest.raises(Unsupported, match=r"was 'sdpa' when hired was applied, and is 'eager' now; call mmaccel"):
            model(**inputs)
        mmaccel.apply(model, METHOD)
        assert largest_difference(model(**inputs).logits, cut) < 1e-5


def test_features_in_the_old_spelling_are_refused():
    model = build("smolvlm")
    inputs = inputs_for("smolvlm", ONE, model)
    with mmaccel.applied(model, METHOD), pytest.raises(Unsupported, match="computed without the method"):
        model.model(input_ids=inputs["input_ids"], mm_encoder_outputs=torch.zeros(9, 32))


# Other ways to generate


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


def test_columns_that_follow_one_to_one_are_trimmed():
    index = torch.tensor([[0, 1, 4, 7, 8, 9], [-1, 2, 3, 7, 8, 9]])
    trimmed = KeptColumns(index, seen=10, padded=True).trimmed()
    assert torch.equal(trimmed.index, index[:, :3]) and trimmed.seen == 7
    assert torch.equal(trimmed.extended(6), index)


@pytest.mark.parametrize(
    "settings",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}, {"num_beams": 4, "num_beam_groups": 2}],
    ids=["contrastive", "dola", "group-beams"],
)
def test_modes_that_left_transformers_are_refused_by_it(settings):
    model, inputs = build("llava"), inputs_for("llava", ONE, build("llava"))
    with mmaccel.applied(model, METHOD), pytest.raises(ValueError, match=r"requires `trust_remote_code=True`"):
        model.generate(**inputs, max_new_tokens=4, **settings)


# Training


@pytest.mark.parametrize(
    ("method", "family"), working(METHOD, RandomTokens(), FourierVLM(gain="paper"), PooledTokens())
)
def test_gradients_flow_as_through_the_kept_tokens(family, method):
    """The gradient of a decorated forward equals the finite difference along it."""
    model = own(family).double().train()
    inputs = inputs_for(family, ONE, model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    weight = find_host(model).text.get_input_embeddings().weight
    ends = ("fc2.weight", "down_proj.weight")
    encoder = next(p for name, p in find_host(model).tower.named_parameters() if name.endswith(ends))

    def loss():
        return model(**inputs).logits[:, -1].logsumexp(-1).sum()

    with mmaccel.applied(model, method):
        with torch.inference_mode():
            model(**inputs)
        loss().backward()
        for part in (weight, encoder):
            step = 1e-3 * part.grad / part.grad.norm()  # the norms run in float32 whatever the model does
            with torch.no_grad():
                part += step
                above = loss()
                part -= 2 * step
                below = loss()
                part += step
            torch.testing.assert_close((above - below) / 2e-3, part.grad.norm(), rtol=1e-2, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, inputs = own().train(), inputs_for("llava", ONE, build("llava"))
    found = []
    with mmaccel.applied(model, METHOD):
        for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
            switch()
            model.zero_grad()
            model(**inputs, use_cache=False).logits[:, -1].sum().backward()
            found.append(model.model.multi_modal_projector.linear_1.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])


# Several models, several threads


def test_two_models_that_share_a_configuration_do_not_meet():
    from transformers import LlavaForConditionalGeneration

    first = own()
    second = LlavaForConditionalGeneration(first.config).eval()
    assert first.model.vision_tower.config is second.model.vision_tower.config
    inputs = inputs_for("llava", ONE, first)
    dense = [generated(model, inputs, 2)[1] for model in (first, second)]
    before = [fingerprint(model) for model in (first, second)]
    mmaccel.apply(first, METHOD)
    assert torch.equal(generated(second, inputs, 2)[1], dense[1])
    mmaccel.apply(second, HiRED(budget=0.5))
    both = [generated(model, inputs, 2)[1] for model in (first, second)]
    mmaccel.remove(first)
    assert torch.equal(generated(first, inputs, 2)[1], dense[0])
    assert torch.equal(generated(second, inputs, 2)[1], both[1])
    assert mmaccel.report(second)["visual_tokens"] == 18
    mmaccel.remove(second)
    assert [fingerprint(model) for model in (first, second)] == before


def test_applying_in_one_thread_leaves_another_thread_s_model_alone():
    first, second = own(), own()
    inputs = inputs_for("llava", ONE, first)
    generated(first, inputs, 2)
    before, stop, failed = fingerprint(first), threading.Event(), []

    def come_and_go():
        for method in itertools.cycle([METHOD, FourierVLM(), HiRED(budget=0.5)]):
            if stop.is_set():
                return
            try:
                with mmaccel.applied(first, method) as run:
                    generated(first, inputs, 1)
                    run.report.to_dict()
            except Exception as error:
                failed.append(error)
                return

    with mmaccel.applied(second, METHOD):
        alone = generated(second, inputs, 4)[1]
        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for _ in range(10):
                assert torch.equal(generated(second, inputs, 4)[1], alone)
        finally:
            stop.set()
            thread.join()
    assert not failed and fingerprint(first) == before


def test_a_report_can_be_read_while_another_thread_generates():
    """Counting FLOPs once ran the living model on tensors without values."""
    model, inputs = build("llava"), inputs_for("llava", ONE, build("llava"))
    with mmaccel.applied(model, METHOD) as run:
        alone = generated(model, inputs, 4)[1]
        figures = run.report.to_dict()
        stop = threading.Event()

        def read():
            while not stop.is_set():
                generated(model, inputs, 1)
                assert run.report["prefill_flops"] == figures["prefill_flops"]

        thread = threading.Thread(target=read)
        thread.start()
        try:
            for _ in range(10):
                assert torch.equal(generated(model, inputs, 4)[1], alone)
        finally:
            stop.set()
            thread.join()


# Images


def test_a_flat_stack_of_tiles_is_read_as_the_padded_one():
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    model = build("llava_next")
    inputs = inputs_for("llava_next", Prompts((((96, 70), (48, 144)),), (7,)), model)
    tiles = [image_size_to_num_patches(size.tolist(), PINPOINTS, 48) for size in inputs["image_sizes"]]
    assert len(set(tiles)) == 2
    flat = torch.cat([pixels[:count] for pixels, count in zip(inputs["pixel_values"], tiles, strict=True)])
    for method in METHODS:
        with mmaccel.applied(model, method):
            padded = generated(model, inputs, 2)[1]
            assert torch.equal(generated(model, {**inputs, "pixel_values": flat}, 2)[1], padded)


@pytest.mark.parametrize(
    ("size", "tiles", "rows", "columns"),
    [
        ((48, 144), (1, 3), range(6), range(18)),
        ((24, 144), (1, 3), range(1, 5), range(18)),  # un-padded: a row of cells goes above, one below
        ((144, 48), (3, 1), range(18), range(6)),
        ((144, 24), (3, 1), range(18), range(1, 5)),
    ],
)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_newline_tokens_of_long_images_stay_with_their_rows(method, size, tiles, rows, columns):
    """By hand: the whole image's 36 tokens, then row by row over the plane of tiles, a newline token behind each."""
    model = build("llava_next")
    inputs = inputs_for("llava_next", Prompts(((size,),)), model)
    with mmaccel.applied(model, method) as run:
        generated(model, inputs, 1)
        (layout,), (cells,) = run.report.details["layouts"], run.report.details["cells"]
        kept = kept_prompt(model, inputs).keep[inputs["input_ids"] == 99]
    assert layout.tiles == tiles
    expected = cells[0].tolist()
    for row in rows:
        line = [bool(cells[1 + row // 6 * tiles[1] + column // 6, row % 6 * 6 + column % 6]) for column in columns]
        expected += [*line, any(line)]
    assert kept.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    holds(model, method, inputs)


SEEN: list[ImageView] = []


class Watching(HiRED):
    """HiRED that shows what it was shown."""

    def select(self, view):
        SEEN.append(view)
        return super().select(view)


def watched(model, inputs):
    SEEN.clear()
    with mmaccel.applied(model, Watching(budget=0.5)), torch.no_grad():
        model(**inputs)
    return list(SEEN)


def eager_weights(model, module, inputs, monkeypatch):
    """The attention matrices of one module, as the eager kernel of its own file computes them."""
    found, own_file = [], sys.modules[type(module).__module__]
    eager = own_file.eager_attention_forward

    def catch(caller, *args, **kwargs):
        out = eager(caller, *args, **kwargs)
        if caller is module:
            found.append(out[1])
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(own_file, "eager_attention_forward", catch)
        model(**inputs)
    return found


def test_saliency_behind_window_attention_is_that_of_the_tokens_in_reading_order(monkeypatch):
    """Qwen2.5-VL, images of different grids, none a multiple of the window: by hand from the full matrices."""
    model = build("qwen2_5_vl", "eager")
    inputs = inputs_for("qwen2_5_vl", Prompts((((96, 80), (48, 112), (80, 48)),), (7,)), model)
    views = watched(model, inputs)
    matrices = eager_weights(model, find_host(model).attention_modules[3], inputs, monkeypatch)
    assert len(matrices) == len(views) == 3
    for view, matrix in zip(views, matrices, strict=True):
        height, width, side = view.layout.height, view.layout.width, 2  # a window has 2 x 2 merged tokens
        order = [
            (top + i) * width + left + j
            for top in range(0, height, side) for left in range(0, width, side)
            for i in range(min(side, height - top)) for j in range(min(side, width - left))
        ]  # fmt: skip
        assert order != sorted(order)
        by_hand = torch.zeros(4, height * width)
        for place, token in enumerate(order):
            by_hand[:, token] = matrix[0, :, :, 4 * place : 4 * place + 4].mean(dim=1).mean(dim=-1)
        torch.testing.assert_close(view.attention["feature"][0], by_hand, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_empty_picture_slots_and_masked_pixels_are_respected(family, monkeypatch):
    model = build(family, "eager")
    inputs = inputs_for(family, Prompts((((48, 48), (48, 48)), ((48, 48),)), (7, 9)), model)
    inputs["pixel_values"][1] = inputs["pixel_values"][1].flip(0)  # the empty slot of the second row comes first
    mask = torch.ones(2, 2, 48, 48, dtype=torch.long)
    mask[0, 1, :, 32:] = 0  # two of six columns of patches, one of three columns of tokens
    inputs["pixel_attention_mask"] = mask
    views = watched(model, inputs)
    (matrix,) = eager_weights(model, find_host(model).attention_modules[-1], inputs, monkeypatch)
    assert len(views) == len(matrix) == 3
    for view, weights in zip(views, matrix, strict=True):
        patches = weights.mean(dim=1).view(4, 3, 2, 3, 2)
        by_hand = patches.mean(dim=(2, 4)).flatten(1)
        torch.testing.assert_close(view.attention["feature"][0], by_hand, rtol=1e-5, atol=1e-7)
    assert (views[1].attention["feature"].view(4, 3, 3)[..., 2] == 0).all()
    for method in METHODS:
        if method.name != "tome":  # refuses masked patches: see test_tome
            holds(model, method, inputs)


def test_a_picture_of_zeros_alone_is_a_picture_to_smolvlm():
    model = build("smolvlm")
    inputs = inputs_for("smolvlm", ONE, model)
    holds(model, METHOD, {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})


# Numbers that rank nothing


def test_attention_that_holds_nan_is_refused():
    model, inputs = build("llava_next"), inputs_for("llava_next", ONE, build("llava_next"))
    pixels = inputs["pixel_values"].clone()
    pixels[0, 0, 0, 0, 0] = torch.nan
    with mmaccel.applied(model, METHOD):
        with pytest.raises(
            ValueError, match=r"attention holds NaN, so hired cannot rank tokens; look for NaN in pixel"
        ):
            model(**{**inputs, "pixel_values": pixels})
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("score", [torch.nan, torch.inf])
def test_a_budget_is_not_shared_by_scores_that_are_no_numbers(score):
    from vision_tokens.hired import apportion

    with pytest.raises(ValueError, match=r"in proportion to finite scores only; got \["):
        apportion(torch.tensor([1.0, score]), 5, torch.tensor([4, 4]))


def test_of_equal_scores_the_earlier_is_kept():
    view = ImageView(Layout(torch.arange(36), 1, 6, 6), {"feature": torch.full((1, 4, 36), 0.1)})
    assert HiRED(budget=9).select(view)[0].nonzero().flatten().tolist() == list(range(9))
    tiled = ImageView(
        Layout(torch.arange(180), 5, 6, 6, (2, 2)),
        {name: torch.full((5, 4, 36), 0.1) for name in ("first", "feature")},
    )
    assert HiRED(budget=72).select(tiled).sum(dim=-1).tolist() == [36, 9, 9, 9, 9]


# Order of applying and removing


def test_blocks_in_blocks_give_back_what_stood_before_each():
    model, inputs = build("llava"), inputs_for("llava", ONE, build("llava"))
    generated(model, inputs, 1)
    before = fingerprint(model)

    def kept():
        generated(model, inputs, 1)
        return mmaccel.report(model)["visual_tokens"]

    with mmaccel.applied(model, HiRED(budget=0.75)):
        with mmaccel.applied(model, HiRED(budget=0.5)):
            assert kept() == 18
            with pytest.raises(ValueError, match="hired and fourier-vlm both act on the stage"):
                mmaccel.apply(model, FourierVLM())
            assert kept() == 18
            mmaccel.remove(model)
            with pytest.raises(ValueError, match="no method is applied to this LlavaForConditionalGeneration"):
                mmaccel.remove(model)
        assert kept() == 27
        mmaccel.apply(model, HiRED(budget=0.25))
        assert kept() == 9
    assert fingerprint(model) == before


def test_a_block_that_raises_gives_the_model_back():
    model = build("llava")
    before = fingerprint(model)
    with pytest.raises(KeyError, match="ours"), mmaccel.applied(model, METHOD):
        raise KeyError("ours")
    assert fingerprint(model) == before


def test_a_copy_made_inside_a_block_outlives_it_as_a_plain_model():
    model, inputs = own(), inputs_for("llava", ONE, build("llava"))
    dense = generated(model, inputs, 2)[1]
    with mmaccel.applied(model, METHOD):
        twin = copy.deepcopy(model)
        with mmaccel.applied(twin, FourierVLM()):
            generated(twin, inputs, 2)
        assert torch.equal(generated(twin, inputs, 2)[1], dense)
    assert TEXT["num_hidden_layers"] == len(twin.model.language_model.layers)
