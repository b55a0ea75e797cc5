"""ToMe inside the encoder: the released schedules, an encoder written out by hand, and what reads its output."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel.attachment import Attachment
from mmaccel.methods import Unsupported
from tests.vision_tokens.counting import counted_flops
from tests.vision_tokens.deep import build_deep
from tests.vision_tokens.golden import load
from tests.vision_tokens.tiny import Prompts, build, inputs_for
from vision_tokens import AIM, FastV, FourierVLM, HiRED, ImageView, SelectingMethod, ToMe, VisionZip
from vision_tokens.encoder_merging import EncoderMerging
from vision_tokens.families import find_host
from vision_tokens.laws import fingerprint, generated, kept_prompt, largest_difference, masked_logits
from vision_tokens.matching import match, merge, unmerge
from vision_tokens.tome import merges, schedule

MERGED = ["llava", "llava-siglip", "llava_next", "smolvlm", "idefics3"]
OTHERS = [HiRED(budget=0.5), VisionZip(budget=0.5), FourierVLM(budget=0.3)]


@pytest.mark.parametrize(
    ("name", "blocks", "merged", "inflection"),
    [("r16_24layers", 24, 16, 0.0), ("r13_m1_12layers", 12, 13, -1.0), ("r8_p05_12layers", 12, 8, 0.5)],
)
def test_schedules_are_the_released_code_s(name, blocks, merged, inflection):
    tensors, _ = load("tome/r_schedules")
    assert schedule(blocks, merged, inflection) == tensors[name].tolist()


def test_a_budget_that_divides_evenly_is_the_paper_s_constant_r():
    assert merges(576, 576 - 23 * 16, 23) == [16] * 23


@given(st.integers(1, 600), st.floats(0.01, 1), st.integers(1, 24), st.floats(-1, 1))
def test_any_budget_in_reach_is_met_to_the_token(patches, share, blocks, inflection):
    kept = max(1, int(patches * share))
    if kept * 2**blocks < patches:
        with pytest.raises(ValueError, match=rf"cannot bring {patches} tokens down to {kept}; ask for at least \d+"):
            merges(patches, kept, blocks, inflection)
        return
    left = patches
    for count in merges(patches, kept, blocks, inflection):
        assert 0 <= count <= left // 2
        left -= count
    assert left == kept


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_the_bias_makes_a_token_count_as_often_as_the_patches_it_holds(queries, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (tokens,), generator=generator)
    query, key = torch.randn(queries, 4, generator=generator), torch.randn(tokens, 4, generator=generator)
    value = torch.randn(tokens, 4, generator=generator)
    ours = (query @ key.mT + sizes.log()).softmax(-1) @ value
    key, value = key.repeat_interleave(sizes, 0), value.repeat_interleave(sizes, 0)
    torch.testing.assert_close(ours, (query @ key.mT).softmax(-1) @ value, rtol=1e-4, atol=1e-5)


def by_hand(host, hidden, counts, proportional=True):
    """The encoder's blocks written out, with full matrices; the tokens that are left, and where each patch went."""
    into = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
    sizes, protected = torch.ones(hidden.shape[:2]), int(host.has_class_token)
    behind = []
    for number, block in enumerate(host.tower.encoder.layers):
        own, norm = block.self_attn, block.layer_norm1(hidden)
        query, key, value = (
            project(norm).unflatten(-1, (4, 8)).transpose(1, 2) for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        logits = query @ key.mT * 8**-0.5 + (sizes.log()[:, None, None] if proportional else 0)
        hidden = hidden + own.out_proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
        if number < len(counts):
            matching = match(key.mean(dim=1), counts[number], protected)
            hidden, sizes = merge(hidden, matching, sizes)
            into = matching.into.gather(1, into)
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
        behind.append((hidden, into))
    return behind


@pytest.mark.parametrize("family", MERGED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("proportional", [True, False])
@torch.no_grad()
def test_the_encoder_is_the_one_written_out_by_hand(family, attention, proportional):
    model = build(family, attention)
    host = find_host(model)
    pixels = inputs_for(family, Prompts(), model)["pixel_values"].flatten(0, -4)
    dense = host.tower(pixels, output_hidden_states=True)
    with mmaccel.applied(model, ToMe(budget=0.4, inflection=-0.5, proportional=proportional)):
        found = host.tower(pixels, output_hidden_states=True)
    blocks = host.family.feature_layer(host.multimodal, 3) + 1
    expected = by_hand(host, dense.hidden_states[0], merges(36, 14, blocks, -0.5), proportional)
    assert torch.equal(found.hidden_states[0], dense.hidden_states[0])
    for ours, (tokens, into) in zip(found.hidden_states[1:], expected, strict=True):
        torch.testing.assert_close(ours, unmerge(tokens, into), rtol=1e-4, atol=1e-5)
    assert found.last_hidden_state.shape == dense.last_hidden_state.shape
    assert expected[blocks - 1][0].shape[1] == 14 + int(host.has_class_token)


@pytest.mark.parametrize("family", MERGED)
@torch.no_grad()
def test_merging_nothing_is_the_dense_encoder_bitwise(family):
    model = build(family)
    host, inputs = find_host(model), inputs_for(family, Prompts(), model)
    dense = generated(model, inputs, 4)
    attachment = Attachment(model, ())
    EncoderMerging("tome", host, lambda patches: [0, 0, 0], proportional=True).attach(attachment)
    try:
        assert torch.equal(generated(model, inputs, 4)[1], dense[1])
    finally:
        attachment.close()


@pytest.mark.parametrize("family", ["llava", "llava-siglip"])
@torch.no_grad()
def test_the_language_model_reads_each_merged_token_once(family):
    model = build(family)
    host, inputs = find_host(model), inputs_for(family, Prompts(), model)
    hidden = host.tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[0]
    tokens, into = by_hand(host, hidden, merges(36, 14, 2))[1]
    first = int(host.has_class_token)
    seats = [next(c for c in range(36) if into[0, c + first] == token) for token in range(first, 14 + first)]
    expected = model.model.multi_modal_projector(tokens)[0, first:][torch.tensor(seats).argsort()]
    with mmaccel.applied(model, ToMe(budget=0.4)):
        prompt = kept_prompt(model, inputs)
    kept = (inputs["input_ids"] == 99) & prompt.keep
    assert int(kept.sum()) == 14
    torch.testing.assert_close(prompt.embeddings[kept], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MERGED)
@torch.no_grad()
def test_the_encoder_s_work_falls_and_the_report_says_what_an_outsider_counts(family):
    """Less than a third of the tokens from the first block on leaves less than three quarters of the work."""
    model = build(family)
    inputs = inputs_for(family, Prompts(), model)
    with counted_flops(find_host(model).tower.encoder) as counted:
        model(**inputs)
        with mmaccel.applied(model, ToMe(budget=0.3, inflection=-1)) as run:
            model(**inputs)
            report = run.report.to_dict()
    assert [report["encoder_flops_dense"], report["encoder_flops"]] == counted
    assert counted[1] < 0.75 * counted[0]
    special = int(find_host(model).has_class_token)
    assert [report["encoder_tokens_dense"], report["encoder_tokens"]] == [36 + special, 10 + special]


@pytest.mark.parametrize("family", MERGED)
@pytest.mark.parametrize("method", OTHERS, ids=lambda method: method.name)
def test_methods_for_the_language_input_act_on_what_is_left(family, method):
    model = build(family)
    inputs = inputs_for(family, Prompts((((96, 70),), ((64, 96),)), (7, 11)), model)
    generated(model, inputs, 1)
    dense, before = generated(model, inputs, 8), fingerprint(model)
    with mmaccel.applied(model, ToMe(budget=0.4), method) as run:
        tokens, logits = generated(model, inputs, 8)
        report, prompt = run.report, kept_prompt(model, inputs)
        assert largest_difference(logits, masked_logits(model, prompt, tokens)) < 1e-4
        assert torch.equal(generated(model, inputs, 8)[1], logits)
        assert [config["method"] for config in report.to_dict()["methods"]] == ["tome", method.name]
        for layout, cells in zip(report.details["layouts"], report.details["cells"], strict=True):
            if isinstance(method, SelectingMethod):
                assert not (cells & ~layout.valid()).any()
                assert int(cells.sum()) == int(method.budget * int(layout.valid().sum()))
    assert fingerprint(model) == before
    assert torch.equal(generated(model, inputs, 8)[1], dense[1])


@pytest.mark.parametrize("others", [(), (HiRED(budget=1.0),)], ids=["alone", "over a method that keeps all"])
def test_places_in_the_whole_prompt_are_refused(others):
    model = build("llava")
    inputs = inputs_for("llava", Prompts(), model)
    with mmaccel.applied(model, ToMe(), *others), pytest.raises(Unsupported, match="drops tokens, so labels for the"):
        model(**inputs, labels=inputs["input_ids"])


def test_three_stages_compose_in_the_order_of_the_data_s_way():
    model = build("llava")
    inputs = inputs_for("llava", Prompts(), model)
    with mmaccel.applied(model, FastV(budget=0.8, layer=1), HiRED(budget=12), ToMe(budget=18)) as run:
        first, second = generated(model, inputs, 8)[1], generated(model, inputs, 8)[1]
        report = run.report.to_dict()
    assert torch.equal(first, second)
    assert [config["method"] for config in report["methods"]] == ["tome", "hired", "fastv"]
    assert report["encoder_tokens"] == 19 and int(report["cuts"][0]["visual_tokens"]) <= 12
    assert report["prefill_flops"] < report["prefill_flops_dense"]
    assert report["encoder_flops"] < report["encoder_flops_dense"]


@pytest.mark.parametrize("merged", [1.0, 0.5])
def test_aim_reads_each_token_that_is_left_once(merged):
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts(), model)
    with mmaccel.applied(model, ToMe(budget=18), AIM(merged=merged)) as run:
        generated(model, inputs, 2)
        report = run.report.to_dict()
    assert report["encoder_tokens"] == 19
    assert report["prompt_tokens_dense"] - report["prompt_tokens"] == 36 - 18 * merged


@pytest.mark.parametrize("family", ["llava", "llava-siglip"])
def test_a_cell_has_its_share_of_what_its_token_gets(family):
    """The attention of all cells is what all tokens got, and the cells of a token have the same."""
    model, seen = build(family), []
    inputs = inputs_for(family, Prompts(), model)

    class Probe(HiRED):
        def select(self, view: ImageView):
            seen.append(view.attention["feature"])
            return super().select(view)

    with mmaccel.applied(model, ToMe(budget=0.4), Probe(budget=0.5)):
        kept_prompt(model, inputs)
    with mmaccel.applied(model, Probe(budget=0.5)):
        kept_prompt(model, inputs)
    merged, dense = seen
    assert merged.shape == dense.shape
    per_head = [len(row.unique()) for row in merged.flatten(0, 1)]
    assert all(count < 36 for count in per_head) and len(dense[0, 0].unique()) == 36
    assert (merged.sum(dim=-1) <= 1).all() and (merged.sum(dim=-1) > 0.5).all()


def test_windowed_encoders_are_refused_with_the_reason():
    model = build("qwen2_5_vl")
    before = fingerprint(model)
    with pytest.raises(Unsupported, match=r"cannot merge inside the encoder 'qwen2_5_vl.*windows are fixed runs"):
        mmaccel.apply(model, ToMe())
    assert fingerprint(model) == before


def test_other_blocks_are_refused(monkeypatch):
    model = build("llava")
    block = model.model.vision_tower.encoder.layers[0]
    monkeypatch.setitem(block._modules, "scale", torch.nn.Identity())
    with pytest.raises(
        Unsupported, match=r"plain pre-norm blocks, as CLIP, SigLIP and Idefics3 have them; the encoder"
    ):
        mmaccel.apply(model, ToMe())


def test_a_kernel_without_a_bias_is_refused_unless_sizes_do_not_count(monkeypatch):
    model = build("llava")
    monkeypatch.setattr(model.model.vision_tower.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(
        Unsupported, match=r"the kernel 'flash_attention_2' cannot; .*'sdpa', or pass proportional=False"
    ):
        mmaccel.apply(model, ToMe())
    mmaccel.remove(mmaccel.apply(model, ToMe(proportional=False)))


def test_several_feature_layers_are_refused(monkeypatch):
    model = build("llava")
    monkeypatch.setattr(model.config, "vision_feature_layer", [-2, -1])
    with pytest.raises(Unsupported, match=r"block by block, and this model reads several of them \(\[-2, -1\]\)"):
        mmaccel.apply(model, ToMe())


def test_masked_patches_are_refused():
    model = build("smolvlm")
    inputs = inputs_for("smolvlm", Prompts(), model)
    mask = torch.ones(1, 1, 48, 48, dtype=torch.long)
    mask[..., 24:] = 0
    with (
        mmaccel.applied(model, ToMe()),
        pytest.raises(Unsupported, match="would merge padding into pictures"),
    ):
        model(**inputs, pixel_attention_mask=mask)


def test_gradient_checkpointing_is_refused():
    model = build("llava")
    inputs = inputs_for("llava", Prompts(), model)
    model.train().gradient_checkpointing_enable()
    try:
        with mmaccel.applied(model, ToMe()), pytest.raises(Unsupported, match="does inference: switch gradient"):
            model(**inputs)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_an_inflection_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"the inflection lies in \[-1, 1\]; got 2. The paper's are 0 and -1"):
        ToMe(inflection=2)
