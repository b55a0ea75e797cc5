"""Methods that decide how much of a chunk is executed: on pi0, on a stand-in, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel import Unsupported
from robotics import (
    Controller,
    FixedHorizon,
    HorizonConsensus,
    HorizonGate,
    SampleConsensus,
    TemporalEnsembling,
    VLAPruner,
)
from robotics.baselines import ensembled
from robotics.horizons import ByHorizon, agreed
from robotics.sample_consensus import most_central, spread
from tests.robotics.tiny import DIMS, HORIZON, lerobot_policy, observation, pi0_policy, token_policy
from vision_tokens.laws import fingerprint

HORIZONS = (2, 4, 6)


def gated(horizons=HORIZONS):
    """pi0 with a random gate."""
    torch.manual_seed(0)
    policy = pi0_policy()
    policy.gate, policy.horizons = HorizonGate(horizons, torch.nn.Linear(16, 1)), horizons
    policy.reset()
    return policy


def drawn(policy, rows=2):
    inputs = policy.observe(observation(rows))
    return inputs, policy.draw(inputs, 3, torch.Generator().manual_seed(1))


def test_a_single_horizon_is_the_plain_policy():
    policy = gated((HORIZON,))
    inputs, noise = drawn(policy)
    found = policy.by_horizon(inputs, noise=noise[:, 0])
    torch.testing.assert_close(found.fused, policy.act(inputs, noise=noise[:, 0]).actions, rtol=1e-5, atol=1e-6)
    assert found.disagreement.max() < 1e-5


def test_every_branch_is_a_model_with_a_shorter_chunk():
    """The gate sees one horizon alone: what comes out is what the model makes of a chunk that is so long."""
    policy = gated()
    inputs, noise = drawn(policy)
    config = policy.model.config
    for number, horizon in enumerate(HORIZONS[:2]):
        policy.gate = HorizonGate(HORIZONS, Choose(number))
        ours = policy.by_horizon(inputs, noise=noise[:, 0]).fused[:, :horizon]
        config.chunk_size = horizon
        try:
            plain = policy.model.sample_actions(**inputs.model, noise=noise[:, 0, :horizon])
        finally:
            config.chunk_size = HORIZON
        torch.testing.assert_close(ours, plain[..., :DIMS], rtol=1e-5, atol=1e-5)


class Choose(torch.nn.Module):
    """A gate for one of the horizons, by the place of its branch in the batch."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, hidden):
        branch = torch.arange(len(hidden)) % len(HORIZONS)
        return torch.where(branch == self.number, 1e4, 0.0)[:, None, None].expand(-1, hidden.shape[1], 1)


def test_horizons_of_a_batch_are_those_of_its_rows():
    policy = gated()
    inputs, noise = drawn(policy)
    together = policy.by_horizon(inputs, noise=noise[:, 0])
    for row in range(2):
        alone = policy.by_horizon(policy.observe(observation(2).only([row])), noise=noise[row : row + 1, 0])
        torch.testing.assert_close(alone.fused[0], together.fused[row], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.disagreement[0], together.disagreement[row], rtol=1e-5, atol=1e-5)


def test_consensus_executes_what_the_rule_says_and_reports_it():
    policy = gated()
    inputs, noise = drawn(policy)
    method = HorizonConsensus(least=1, ratio=1.2, active=0)
    plain = policy.by_horizon(inputs, noise=noise[:, 0])
    with mmaccel.applied(policy, method) as run:
        chunk = policy.act(inputs, noise=noise[:, 0])
        assert torch.equal(chunk.execute, agreed(plain.disagreement, 1, 1.2, HORIZONS, 0))
        assert run.report.facts["executed"] == chunk.execute.tolist() and len(run.report.facts["disagreement"][0]) == 6
    with mmaccel.applied(policy, replace(method, most=1)):
        assert policy.act(inputs, noise=noise[:, 0]).execute.tolist() == [1, 1]


def test_a_vote_needs_a_policy_that_regresses():
    policy = gated()
    inputs, noise = drawn(policy)
    with mmaccel.applied(policy, HorizonConsensus(rule="vote")), pytest.raises(Unsupported, match="use rule='disagr"):
        policy.act(inputs, noise=noise[:, 0])
    same = torch.zeros(2, 3, HORIZON, DIMS)
    policy.by_horizon = lambda inputs, generator, noise: ByHorizon(
        same[:, 0], actions=same + torch.eye(3)[0, :, None, None]
    )
    with mmaccel.applied(policy, HorizonConsensus(rule="vote", least=2)):
        assert policy.act(inputs).execute.tolist() == [4, 4]  # behind it a single horizon is left


# Samples


def test_samples_behind_one_prefix_are_the_chunks_one_by_one_also_when_tokens_are_dropped():
    policy = pi0_policy()
    policy.reset()
    inputs, noise = drawn(policy)
    for method in (None, VLAPruner(kept_share=0.25, layer=2, window=1, refresh=None)):
        if method is not None:
            mmaccel.apply(policy, method)
            policy.act(inputs, noise=noise[:, 0])
        together = policy.sample(inputs, 3, noise=noise)
        for number in range(3):
            if method is not None:
                policy.reset()
                policy.act(policy.observe(observation()), noise=noise[:, 0])
            alone = policy.act(inputs, noise=noise[:, number]).actions
            torch.testing.assert_close(together[:, number], alone, rtol=1e-5, atol=1e-5)
    mmaccel.remove(policy)


def test_sample_consensus_executes_what_draws_agree_on():
    policy = pi0_policy()
    policy.reset()
    inputs, noise = drawn(policy)
    chunks = policy.sample(inputs, 3, noise=noise)
    before = fingerprint(policy.model)
    with mmaccel.applied(policy, SampleConsensus(samples=3, least=1)) as run:
        chunk = policy.act(inputs, noise=noise)
        assert any(torch.equal(chunk.actions[0], one) for one in chunks[0])
        assert chunk.execute.tolist() == run.report.facts["executed"]
        assert run.report["executed"] == sum(chunk.execute.tolist()) / 2
    for tolerance, expected in ((1e-9, 1), (1e9, HORIZON)):
        with mmaccel.applied(policy, SampleConsensus(samples=3, least=1, tolerance=tolerance)):
            assert policy.act(inputs, noise=noise).execute.tolist() == [expected] * 2
    assert fingerprint(policy.model) == before and "act" not in vars(policy)


def test_the_chosen_chunk_is_the_one_nearest_to_the_others():
    chunks = torch.tensor([0.0, 1.0, 9.0])[None, :, None, None].expand(1, 3, 4, 2)
    assert most_central(chunks).tolist() == [1]
    assert spread(chunks, chunks[:, 1]).tolist() == [[9.0] * 4]


# Baselines


def test_a_fixed_horizon_executes_the_beginning_of_the_plain_chunk():
    policy = lerobot_policy()
    policy.reset()
    inputs = policy.observe(observation())
    plain = policy.act(inputs, torch.Generator().manual_seed(3))
    with mmaccel.applied(policy, FixedHorizon(least=2)):
        chunk = policy.act(inputs, torch.Generator().manual_seed(3))
        assert torch.equal(chunk.actions, plain.actions) and chunk.execute.tolist() == [2, 2]
        control = Controller(policy)
        control.reset()
        for step in range(6):
            control.step(observation(2, step))
        assert control.calls == 3


@given(st.floats(0, 1), st.integers(1, 4))
def test_ensembling_is_the_weighted_mean_of_all_that_reach_a_step(decay, chunks):
    made = [torch.arange(4.0)[:, None] + 10 * number for number in range(chunks)]
    overlapping = [one[chunks - 1 - number :] for number, one in enumerate(made)]
    found = ensembled(overlapping, decay)
    for step in range(4):
        reach = [one[step] for one in overlapping if len(one) > step]
        weights = torch.exp(-decay * torch.arange(len(reach)))
        torch.testing.assert_close(found[step, 0], (weights * torch.cat(reach)).sum() / weights.sum())


def test_ensembling_forgets_rows_that_are_reset():
    policy = lerobot_policy()
    with mmaccel.applied(policy, TemporalEnsembling()):
        policy.reset()
        for step in range(3):
            inputs = policy.observe(observation(2, step))
            if step == 2:
                policy.reset([1])
            plain = type(policy).act(policy, inputs, torch.Generator().manual_seed(step)).actions
            chunk = policy.act(inputs, torch.Generator().manual_seed(step))
            assert chunk.execute.tolist() == [1, 1]
        assert torch.equal(chunk.actions[1], plain[1]) and not torch.allclose(chunk.actions[0], plain[0])


# What is refused


def test_what_has_no_chunks_no_noise_or_no_horizons():
    with pytest.raises(Unsupported, match=r"fixed-horizon decorates a policy; got Linear. Put PI0Policy, Action"):
        mmaccel.apply(torch.nn.Linear(1, 1), FixedHorizon())
    for method in (FixedHorizon(), TemporalEnsembling(), HorizonConsensus(), SampleConsensus()):
        with pytest.raises(Unsupported, match="ActionTokenPolicy makes one action a call; there is nothing to choose"):
            mmaccel.apply(token_policy(), method)
    with pytest.raises(Unsupported, match="draws no noise: all would be the same; fixed-horizon works on any"):
        mmaccel.apply(token_policy(horizon=2), SampleConsensus())
    with pytest.raises(Unsupported, match=r"trained with several horizons, and its gate.*there is SampleConsensus"):
        mmaccel.apply(pi0_policy(), HorizonConsensus())
    with pytest.raises(ValueError, match="sample-consensus and fixed-horizon both act on the stage 'execute'"):
        mmaccel.apply(pi0_policy(), SampleConsensus(), FixedHorizon())


def test_settings_that_fit_no_chunk():
    with pytest.raises(
        ValueError, match="at least 9 actions, and a chunk of this PI0Policy has 6; pass least=6 or less"
    ):
        mmaccel.apply(pi0_policy(), FixedHorizon(least=9))
    with pytest.raises(ValueError, match="at most no fewer than that; got least=5, most=3"):
        HorizonConsensus(most=3)
    with pytest.raises(ValueError, match="horizon-consensus's ratio is above 0; got 0"):
        HorizonConsensus(ratio=0)
    with pytest.raises(ValueError, match="compares samples, at least 2; got 1"):
        SampleConsensus(samples=1)
    with pytest.raises(ValueError, match="sample-consensus's tolerance is above 0; got 0"):
        SampleConsensus(tolerance=0)
    with pytest.raises(ValueError, match=r"horizons ascend to the model's chunk of 6 actions; got \[2, 4\]"):
        HorizonGate((2, 4), torch.nn.Linear(16, 1)).check(6)


def causal(mask):
    """Where actions are causal a short horizon repeats the long one, and agreement would mean nothing."""
    seen = torch.ones(mask.shape[-2:], dtype=torch.bool).tril(mask.shape[-1] - mask.shape[-2])
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (causal, "do not all see each other, so that a shorter horizon would say the same"),
        (lambda mask: None, r"an entry for every pair of tokens; load the model with attn_implementation='sdpa'"),
    ],
)
def test_masks_that_horizons_cannot_be_hidden_by(change, message):
    policy = gated()
    inputs, noise = drawn(policy)
    handle = policy.model.model.dit.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": change(kwargs["attention_mask"])}),
        with_kwargs=True,
    )
    try:
        with pytest.raises(Unsupported, match=message):
            policy.by_horizon(inputs, noise=noise[:, 0])
    finally:
        handle.remove()
