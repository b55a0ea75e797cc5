"""The merging mechanism: what a method sees, and what the language model reads, against the same made by hand."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import mmaccel
from tests.vision_tokens.tiny import FAMILIES, Prompts, build, inputs_for
from vision_tokens import ImageView, Merged, MergingMethod, PruMerge, VisionZip
from vision_tokens.aim_merging import merge_cells
from vision_tokens.families import find_host
from vision_tokens.laws import generated, kept_prompt, largest_difference, masked_logits

SQUARE = ["llava", "llava-siglip", "llava_next"]
METHODS = [VisionZip(budget=0.4), PruMerge(neighbours=4)]


def by_hand(family, method, inputs):
    """Embeddings of the merged tokens, picture by picture: an eager encoder's own attention, keys and features."""
    body = build(family, "eager").model
    layers, keys = body.vision_tower.encoder.layers, {}
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output, at=at: keys.update({at: output}))
        for at, layer in enumerate(layers)
    ]
    with torch.no_grad():
        seen = body.vision_tower(
            inputs["pixel_values"].flatten(0, -4), output_hidden_states=True, output_attentions=True
        )
    for hook in hooks:
        hook.remove()
    first = 0 if family == "llava-siglip" else 1  # without the class token
    attention = {at: rows[:, :, 0, 1:] if first else rows.mean(dim=2) for at, rows in enumerate(seen.attentions)}
    if method.joined_heads:
        layer = len(layers) - 1
        queries = layers[layer].self_attn.q_proj(layers[layer].layer_norm1(seen.hidden_states[layer]))
        rows = (queries @ keys[layer].mT * queries.shape[-1] ** -0.5).softmax(-1)
        attention = {layer: rows[:, None, 0, 1:] if first else rows.mean(dim=1)[:, None]}
        keys = {layer: keys[layer][:, first:]}
        name = "last"
    else:
        layer = len(layers) - 2
        keys = {layer: keys[layer].unflatten(-1, (4, -1)).mean(dim=2)[:, first:]}
        name = "feature"
    model = build(family)
    layouts = find_host(model).family.image.layouts(model.model, inputs)
    assert len(layouts) == 1
    view = ImageView(layouts[0][0], {name: attention[layer]}, {name: keys[layer]})
    seats, merged = method.merge(view, seen.hidden_states[-2][:, first:])
    grid = torch.zeros(*seats.shape, 32)
    grid[seats] = body.multi_modal_projector(merged[None])[0]
    source = view.layout.source
    return grid.flatten(0, 1)[source[source >= 0]][seats.flatten()[source[source >= 0]]].detach()


@pytest.mark.parametrize("family", SQUARE)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_language_model_reads_what_merging_by_hand_gives(family, method):
    model = build(family)
    inputs = inputs_for(family, Prompts(), model)
    with mmaccel.applied(model, method):
        prompt = kept_prompt(model, inputs)
        tokens, logits = generated(model, inputs, 4)
    kept = (inputs["input_ids"] == 99) & prompt.keep
    newline = getattr(model.model, "image_newline", None)
    if newline is not None:
        kept &= ~(prompt.embeddings == newline).all(dim=-1)
    expected = by_hand(family, method, inputs)
    torch.testing.assert_close(prompt.embeddings[kept], expected, rtol=1e-4, atol=1e-5)
    prompt.embeddings[kept] = expected  # the bare model, fed the merged features by hand
    assert largest_difference(logits, masked_logits(model, prompt, tokens)) < 1e-4


@dataclass(frozen=True, kw_only=True)
class Probe(VisionZip):
    """VisionZip, which notes what it saw."""

    seen: ClassVar[list] = []

    def merge(self, view, features):
        self.seen.append((view, features))
        return super().merge(view, features)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "idefics3"])
def test_behind_the_encoder_a_method_sees_every_image_s_own_tokens(family):
    model = build(family)
    inputs = inputs_for(family, Prompts((((96, 70), (64, 96)),), (7,)), model)
    names = [name for name in ("pixel_values", "image_grid_thw") if name in inputs]
    dense = torch.cat(list(model.model.get_image_features(**{name: inputs[name] for name in names}).pooler_output))
    Probe.seen.clear()
    with mmaccel.applied(model, Probe(budget=0.4)):
        encoded = model.model.get_image_features(**{name: inputs[name] for name in names})
    views, features = zip(*Probe.seen, strict=True)
    assert torch.equal(torch.cat([part.flatten(0, 1) for part in features]), dense)
    merged = torch.cat([VisionZip.merge(Probe(budget=0.4), *seen).features for seen in Probe.seen])
    kept = torch.cat(encoded.mmaccel.keep)
    assert torch.equal(torch.cat(list(encoded.pooler_output))[kept], merged)
    for view in views:
        assert view.keys["feature"].shape[:2] == (view.layout.partitions, view.layout.cells)
        assert view.attention["feature"].shape[-1] == view.layout.cells


@dataclass(frozen=True, kw_only=True)
class Halved(MergingMethod):
    """Puts the negative of every second token behind the projector on its cell."""

    name = "halved"
    projected = True

    budget: float = 0.5

    def merge(self, view, features):
        seats = torch.zeros(features.shape[:2], dtype=torch.bool)
        seats[:, ::2] = True
        return Merged(seats, -features[seats])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "molmo2"])
def test_a_method_may_merge_what_the_projector_gives(family):
    model = build(family)
    inputs = inputs_for(family, Prompts(), model)
    dense, merged = kept_embeddings(model, inputs), kept_embeddings(model, inputs, Halved())
    visual = inputs["input_ids"] == 99
    newline = getattr(model.model, "image_newline", None)
    if newline is not None:
        visual &= ~(dense == newline).all(dim=-1)
    read, kept = merged[visual], (merged[visual] != 0).any(dim=-1)
    assert 0 < int(kept.sum()) <= (int(visual.sum()) + 4) // 2 + 4
    torch.testing.assert_close(read[kept], -dense[visual][kept], rtol=1e-5, atol=1e-6)


def kept_embeddings(model, inputs, *methods):
    """What the language model would read, nothing dropped yet."""
    from vision_tokens import UniformTokens

    with mmaccel.applied(model, *(methods or (UniformTokens(budget=1.0),))):
        return kept_prompt(model, inputs).embeddings


@dataclass(frozen=True, kw_only=True)
class Similar(MergingMethod):
    """Merges by the features themselves."""

    name = "similar"
    projected = True

    budget: float = 0.5

    def merge(self, view, features):
        return merge_cells(features, view.layout, view.layout.valid().sum(dim=-1) // 3)


@pytest.mark.parametrize("method", [VisionZip(budget=0.4), Similar()], ids=lambda method: method.name)
def test_features_of_several_depths_merge_alike(method, monkeypatch):
    """As Qwen3-VL hands them on: twice the same features merge to twice the same, on the same seats."""
    model = build("qwen2_5_vl")
    inputs = inputs_for("qwen2_5_vl", Prompts(), model)
    plain = model.model.get_image_features

    def stacked(pixel_values, image_grid_thw=None, **kwargs):
        output = plain(pixel_values, image_grid_thw, **kwargs)
        flat = torch.cat(list(output.pooler_output))
        output["deepstack_features"] = [flat, -2 * flat]
        return output

    monkeypatch.setitem(vars(model.model), "get_image_features", stacked)
    with mmaccel.applied(model, method):
        output = model.model.get_image_features(**{key: inputs[key] for key in ("pixel_values", "image_grid_thw")})
    first, (same, other), kept = (
        torch.cat(list(output.pooler_output)),
        output.deepstack_features,
        output.mmaccel.keep[0],
    )
    assert 0 < int(kept.sum()) < len(kept) and torch.equal((first != 0).any(dim=-1), kept)
    torch.testing.assert_close(same, first)
    torch.testing.assert_close(other, -2 * first)
