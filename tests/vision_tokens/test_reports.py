"""Every figure of a report, checked by an outside counter."""

import pytest
import torch

import mmaccel
from tests.vision_tokens.counting import bytes_of, counted_flops
from tests.vision_tokens.test_families import choice
from tests.vision_tokens.tiny import FAMILIES, Prompts, build, inputs_for
from vision_tokens import HiRED
from vision_tokens.attention_rows import attention_rows, class_attention, received_attention, recording
from vision_tokens.families import find_host


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_flops_and_bytes_are_what_an_outsider_counts(family, rows):
    model = build(family)
    prompts = Prompts((((96, 70),), ((64, 96),))[:rows], (7, 12)[:rows])
    inputs = inputs_for(family, prompts, model)
    host, lengths = find_host(model), []
    hook = host.decoder_layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    with counted_flops(host.text) as counted, torch.no_grad():
        dense = model(**inputs, use_cache=True).past_key_values
        with mmaccel.applied(model, choice(family)) as run:
            cache = model(**inputs, use_cache=True).past_key_values
            report = run.report
    hook.remove()
    report = report.to_dict()
    assert [report["prefill_flops_dense"], report["prefill_flops"]] == counted
    assert [report["prompt_tokens_dense"], report["prompt_tokens"]] == lengths
    assert [report["kv_bytes_dense"], report["kv_bytes"]] == [bytes_of(dense), bytes_of(cache)]
    assert (report["kv_bytes"] < report["kv_bytes_dense"]) == (family != "llava-mistral")  # a full window is a full one
    assert report["visual_tokens_dense"] == int((inputs["input_ids"] == 99).sum())
    if rows == 1:  # no padding
        assert lengths[0] - lengths[1] == report["visual_tokens_dense"] - report["visual_tokens"]
    assert report["images"] == rows
    assert {"encode", "prefill"} <= set(report["seconds"])


def test_a_report_reads_as_a_table_and_knows_its_figures():
    model = build("llava")
    with mmaccel.applied(model, HiRED(budget=0.2)) as run:
        model.generate(**inputs_for("llava", Prompts(), model), max_new_tokens=3)
        text = str(run.report)
        assert "mmaccel report: hired" in text and "visual tokens: 36 -> 7 tokens" in text and "decode:" in text
        with pytest.raises(KeyError, match="this report has no figure 'flops'; it has images, visual_tokens"):
            run.report["flops"]


@pytest.mark.parametrize("queries", [1, 255, 256, 700])
def test_received_attention_is_the_column_mean_of_the_full_matrix(queries):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 3, queries, 8, generator=generator).unbind(0)
    full = (query @ key.mT * 0.3).softmax(-1)
    torch.testing.assert_close(received_attention(query, key, 0.3), full.mean(dim=2), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(class_attention(query, key, 0.3), full[:, :, 0, 1:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mask_kind", ["boolean", "additive"])
def test_masked_keys_get_no_attention(mask_kind):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 3, 20, 8, generator=generator).unbind(0)
    seen = torch.rand(1, 1, 1, 20, generator=generator) > 0.4
    seen[..., 0] = True
    mask = seen if mask_kind == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    for shown in (mask, mask.expand(1, 1, 20, 20)):
        rows = received_attention(query, key, 0.3, shown)
        assert (rows[..., ~seen[0, 0, 0]] == 0).all()
        torch.testing.assert_close(rows.sum(-1), torch.ones(1, 3))
        torch.testing.assert_close(rows, attention_rows(query, key, 0.3, shown).mean(dim=2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mask_kind", ["boolean", "additive"])
def test_two_pictures_in_one_sequence_get_what_each_gets_alone(mask_kind):
    query, key = torch.randn(2, 1, 3, 20, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    own = torch.block_diag(torch.ones(8, 8), torch.ones(12, 12)).bool()[None, None]
    mask = own if mask_kind == "boolean" else torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min)
    together = received_attention(query, key, 0.3, mask)
    for part in (slice(0, 8), slice(8, 20)):
        alone = received_attention(query[:, :, part], key[:, :, part], 0.3)
        torch.testing.assert_close(together[..., part], alone, rtol=1e-5, atol=1e-7)


def test_reading_rows_never_allocates_an_n_by_n_matrix():
    """By shape: no tensor that the readers make has two dimensions of the sequence's length."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, shapes = 1200, []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(t.shape for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    query = torch.randn(1, 2, tokens, 4)
    with Shapes():
        class_attention(query, query, 0.5)
        received_attention(query, query, 0.5)
    assert shapes
    for shape in shapes:
        assert sum(side >= tokens - 1 for side in shape) <= 1, shape


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_recorded_rows_are_the_attention_of_the_eager_model(attention):
    """The rows read beside the kernel equal the weights that an eager encoder returns."""
    model, eager = build("llava", attention), build("llava", "eager")
    pixels = inputs_for("llava", Prompts(), model)["pixel_values"]
    with torch.no_grad():
        weights = eager.model.vision_tower(pixels, output_attentions=True).attentions
        with mmaccel.applied(model, HiRED()):
            modules = find_host(model).attention_modules[:2]  # the last is not asked, so it is not listened to
            with recording(dict.fromkeys(modules, class_attention)) as rows:
                model.model.vision_tower(pixels)
    for module, expected in zip(modules, weights[:2], strict=True):
        torch.testing.assert_close(rows[module][0], expected[:, :, 0, 1:], rtol=1e-5, atol=1e-7)


def test_the_wrapped_kernel_keeps_its_nature_in_its_name():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = build("llava")
    modules = find_host(model).attention_modules
    with mmaccel.applied(model, HiRED()):
        names = [module.config._attn_implementation for module in modules]
        assert names == ["mmaccel_sdpa", "mmaccel_sdpa", "sdpa"]  # the first, and the one that LLaVA reads
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert all(module.config is model.model.vision_tower.config for module in modules)
    assert "mmaccel_sdpa" in ALL_ATTENTION_FUNCTIONS
