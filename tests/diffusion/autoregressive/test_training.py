"""Training: a draft comes near its target, and pocket-mar's run writes checkpoints of both."""

import pytest
import torch

from diffusion.autoregressive import ContinuousSpeculation, MARModel, training
from diffusion.autoregressive.randomness import Randomness
from diffusion.autoregressive.training import distillation_loss
from mmaccel import applied
from mmaccel.pocket import train
from tests.diffusion.autoregressive.tiny import seeds, tiny


def distance(draft, target, tokens, labels, guidance=1.0, seed=0):
    """From all of these tokens."""
    count = len(tokens) * tokens.shape[1]
    draws = Randomness.of(seeds(seed)[0], count, tokens)
    return distillation_loss(draft, target, tokens, labels, torch.arange(count), draws, guidance)


@pytest.mark.parametrize("attention", ["causal", "shared"])
def test_distilling_brings_the_draft_nearer_and_more_of_its_tokens_are_kept(attention):
    target, draft = tiny(spread=0.3), tiny(seed=3, spread=0.1, attention=attention)
    tokens = target.to_tokens(target.generate([1, 2], 32, generator=seeds(0)[0]))
    labels = torch.tensor([1, 2]).repeat_interleave(16)

    def kept():
        with applied(target, ContinuousSpeculation(draft=draft)) as run:
            target.generate([1, 2], 32, generator=torch.Generator().manual_seed(5))
        return run.report["acceptance"]

    before, optimizer, losses = kept(), torch.optim.AdamW(draft.parameters(), lr=5e-3), []
    for step in range(60):
        optimizer.zero_grad()
        loss = distance(draft, target, tokens, labels, seed=step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert kept() > before
    with torch.no_grad():
        assert distance(draft, target, tokens, labels, 3.0) > distance(draft, target, tokens, labels)


def test_the_target_is_at_no_distance_from_itself():
    target = tiny()
    tokens, labels = torch.randn(2, 9, 2), torch.tensor([1, -1])
    assert distance(target, target, tokens, labels).item() < 1e-3
    with pytest.raises(ValueError, match=r"diffusion heads are distilled; .* learns from data: draft.loss"):
        mixture = tiny(head="mixture")
        distance(mixture, mixture, tokens, labels)


def test_pocket_mar_trains_and_comes_as_two_checkpoints(tmp_path, monkeypatch):
    """Two steps of small models; its scenes hold one thing each."""
    small = {**training.COMMON, "attention_heads": 2, "hidden_size": 16, "encoder_layers": 1, "head_width": 16}
    small["diffusion_steps"] = 2
    monkeypatch.setattr(training, "make_target", lambda: MARModel(training.MARConfig(**small, head_layers=1)))
    monkeypatch.setattr(training, "make_draft", training.make_target)
    monkeypatch.setattr(training, "BATCH", 4)
    monkeypatch.setattr(training, "OWN", 2)
    monkeypatch.setattr(training, "CHOSEN", 8)
    monkeypatch.setattr(training, "figures", lambda weights: {"drawn": 0.0})
    weights = train.train("pocket-mar", tmp_path, steps=2)
    for folder in (weights, weights / "draft"):
        model = MARModel.from_pretrained(folder).float().eval()
        assert model.generate([0], generator=seeds(1), diffusion_steps=2).shape == (1, 4, 8, 8)
    assert "pocket-mar" in train.trainable() and "pocket-clip" in train.trainable()
    with pytest.raises(ValueError, match=r"'pocket-mars' cannot be trained here; pocket-clip, .*pocket-mar, .* can"):
        train.train("pocket-mars", tmp_path)


def test_the_recipes_models_have_the_sizes_that_it_says():
    assert training.make_target().num_parameters() == pytest.approx(9.6e6, rel=0.01)
    assert training.make_draft().num_parameters() == pytest.approx(0.67e6, rel=0.01)
