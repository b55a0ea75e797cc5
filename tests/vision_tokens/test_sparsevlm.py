"""SparseVLM reproduces the released code's raters, scores and clusters, and spends its budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.deep import build_deep
from tests.vision_tokens.golden import load
from tests.vision_tokens.tiny import Prompts, inputs_for
from vision_tokens import SparseVLM
from vision_tokens.decoder_layers import keep_highest
from vision_tokens.laws import generated, kept_prompt, largest_difference
from vision_tokens.layer_cutting import per_layer
from vision_tokens.sparsevlm import TABLES, clusters_of, density_peaks, rating, table_shares, text_raters

GOLDENS = ["rank_layer6_retain64", "rank_layer15_retain64"]


@pytest.mark.parametrize("name", GOLDENS)
def test_raters_scores_and_selection_are_the_released_code_s(name):
    tensors, _ = load(f"sparsevlm/{name}")
    start, count, _ = tensors["span_vstart_vnum_tnum"].tolist()
    embeddings, raters = tensors["embeddings"], tensors["text_rater_index"]
    visual = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
    visual[:, start : start + count] = True
    marks = SparseVLM().mark(embeddings, visual, torch.ones_like(visual))
    assert torch.equal(marks[0].nonzero().flatten(), raters + start + count)
    rows = tensors["attention"][None, :, marks[0]]
    scores = rating(rows, torch.ones(rows.shape[::2][:1] + rows.shape[2:3], dtype=torch.bool))
    torch.testing.assert_close(scores[:, start : start + count], tensors["visual_score"], rtol=1e-5, atol=1e-8)
    nominal, layer = tensors["retain_layer"].tolist()
    keep = keep_highest(scores, visual, [TABLES[nominal][(2, 6, 15).index(layer)]])
    assert torch.equal(keep[:, start : start + count], tensors["visual_keep_mask"].bool())


def test_clusters_are_the_released_code_s():
    tensors, _ = load("sparsevlm/cluster_40_to_5")
    centres, means = density_peaks(tensors["x"][0], int(tensors["cluster_num"]))
    torch.testing.assert_close(means, tensors["merged"][0], rtol=1e-5, atol=1e-5)
    assert len(set(centres.tolist())) == 5


def test_tables_and_depths_are_the_released_code_s():
    method = SparseVLM(table=64, recycle=False)
    assert list(method.cuts(32)) == [3, 7, 16]
    assert method.kept(32, 576) == [66, 30, 17]
    assert SparseVLM(recycle=False).kept(32, 200) == [199, 198, 110]  # at most all but one
    assert clusters_of(276) == (83, 9)


@given(st.integers(5, 60), st.integers(1, 3000), st.floats(0.01, 1.0), st.booleans())
def test_the_mean_over_layers_is_the_budget_recycled_tokens_included(layers, visual, budget, recycle):
    method = SparseVLM(budget=budget, recycle=recycle)
    first = max(1, round(3 * layers / 32))
    if budget == 1.0 or budget < first / layers + 1e-6:
        return
    held, spent = visual, {}
    for cut, count in zip(method.cuts(layers), method.kept(layers, visual), strict=True):
        held = count + (clusters_of(held - count)[1] if recycle else 0)
        spent[cut] = held
    assert list(spent.values()) == sorted(spent.values(), reverse=True)
    mean = sum(per_layer(visual, spent, layers)) / layers
    assert mean - budget * visual <= 1
    assert budget * visual - mean <= (1 if not recycle else 2)


@pytest.mark.parametrize("nominal", TABLES)
def test_a_table_s_mean_gives_the_table(nominal):
    full, *kept = 576, *TABLES[nominal]
    mean = (3 * full + 4 * kept[0] + 9 * kept[1] + 16 * kept[2]) / 32 / 576
    assert [share * 576 for share in table_shares(mean, (3, 7, 16), 32)] == pytest.approx(kept)


def test_raters_are_looked_for_behind_the_first_image_or_else_everywhere():
    embeddings = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    visual = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    marks = SparseVLM().mark(embeddings, visual, torch.ones_like(visual))
    assert marks[0].any() and not marks[0, :4].any()
    assert marks[1].any() and not marks[1, 4:].any()
    assert not marks[2].any()
    assert torch.equal(marks[0, 4:], text_raters(embeddings[0, 2:4], embeddings[0, 4:]))


@pytest.mark.parametrize("positions", ["kept", "packed"])
def test_recycled_clusters_take_their_centres_places(positions):
    """By hand: layer by layer on the bare model, with the clusters' means put where their centres were."""
    model = build_deep("llava")
    inputs = inputs_for("llava", Prompts(), model)
    method, seen = SparseVLM(budget=0.6, positions=positions), []

    class Watching(SparseVLM):
        def choose(self, hidden, scores, visual, counts):
            out = super().choose(hidden, scores, visual, counts)
            seen.append((hidden, scores, visual, counts, *out))
            return out

    with mmaccel.applied(model, Watching(budget=0.6, positions=positions)) as run:
        _, logits = generated(model, inputs, 1)
        cuts = [cut["layer"] for cut in run.report.facts["cuts"]]
        prompt = kept_prompt(model, inputs)
    text = model.model.language_model
    hidden, places = prompt.embeddings, torch.arange(prompt.embeddings.shape[1])
    with torch.no_grad():
        for number, layer in enumerate(text.layers):
            if number in cuts:
                before, scores, visual, counts, *_ = seen[cuts.index(number)]
                torch.testing.assert_close(hidden, before, rtol=1e-4, atol=1e-5)
                dropped = (visual & ~keep_highest(scores, visual, counts))[0].nonzero().flatten()
                chosen, clusters = clusters_of(len(dropped))
                best = dropped[scores[0, dropped].argsort(descending=True)[:chosen]].sort().values
                centres, means = density_peaks(hidden[0, best], clusters)
                gone = torch.tensor(sorted(set(dropped.tolist()) - set(best[centres].tolist())))
                hidden = hidden.index_put((torch.zeros(clusters, dtype=torch.long), best[centres]), means)
                stay = torch.ones(hidden.shape[1], dtype=torch.bool).index_fill(0, gone, False)
                hidden, places = hidden[:, stay], places[stay]
            at = places if positions == "kept" else torch.arange(len(places))
            hidden = layer(hidden, attention_mask=None, position_embeddings=text.rotary_emb(hidden, at[None]))
        reference = model.lm_head(text.norm(hidden[:, -1:]))
    assert len(seen) == 3 and len(places) < prompt.embeddings.shape[1]
    assert largest_difference(logits, reference) < 1e-5
    assert method.merges and not SparseVLM(recycle=False).merges


def test_a_decoder_too_shallow_for_three_cuts_is_refused():
    with pytest.raises(
        Unsupported, match=r"sparsevlm drops tokens before the layers \[1, 2, 3\], and this decoder has 3"
    ):
        SparseVLM().cuts(3)


def test_a_table_that_the_released_code_lacks_is_refused():
    with pytest.raises(ValueError, match="the released code has tables for 192, 128, 96, 64 tokens; got 100"):
        SparseVLM(table=100)
