"""Speculation end to end: the target's distribution, batches, laws, reports, and what is refused."""

import dataclasses
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

import mmaccel
from diffusion.autoregressive import ContinuousSpeculation, MARConfig
from diffusion.autoregressive.acceptance import BoundedRule, PublishedRule, TrajectoryRule, Verdict
from diffusion.autoregressive.lengths import best_length, tokens_a_round
from diffusion.autoregressive.origins import BONUS, KEPT, PLAIN, REDRAWN
from diffusion.autoregressive.published import published_tokens
from diffusion.autoregressive.rounds import Rounds, Tally
from diffusion.autoregressive.sampling import Call
from diffusion.autoregressive.settings import Sampling
from diffusion.autoregressive.two_samples import energy_test
from mmaccel.checks import check
from mmaccel.cli import app
from mmaccel.ledger import Ledger
from mmaccel.methods import Unsupported
from mmaccel.reports import Report
from tests.diffusion.autoregressive import gaussian
from tests.diffusion.autoregressive.gaussian import AutoregressiveRun, draws, ks
from tests.diffusion.autoregressive.tiny import Recorded, near, published, seeds, tiny
from tests.vision_tokens.golden import load

MODES = {
    "exact": {"head": "diffusion"},
    "exact-noise": {"head": "diffusion"},
    "mixture": {"head": "mixture"},
    "bounded": {"head": "diffusion"},
}
MORE = {"bounded": {"tau": 0.2}}
every_mode = pytest.mark.parametrize("mode", MODES)
exact_modes = pytest.mark.parametrize("mode", ["exact", "exact-noise", "mixture"])


def pair(mode, distance=0.02, **settings):
    model = tiny(**{**MODES[mode], **settings})
    return model, near(model, distance)


def speculation(mode, draft, **settings):
    return ContinuousSpeculation(**{"draft": draft, "mode": mode, **MORE.get(mode, {}), **settings})


class FourTokens:
    """Enough of a model for a `Call` whose runs are not its own."""

    config = MARConfig(grid=2, channels=1, latent_scale=1.0, attention="causal")
    unconditional = torch.zeros(1, dtype=torch.float64)

    def to_latents(self, tokens):
        return tokens


def gaussian_rounds(rule, count=10_000, length=3, prefilled=0, seed=0):
    """Four tokens an image by two Gaussian autoregressive models; what should be standard normal, and the run."""
    empty = torch.zeros(0, dtype=torch.float64)
    target, draft = (
        AutoregressiveRun(gaussian.target(empty).at_shift, 0.6),
        AutoregressiveRun(gaussian.draft(empty).at_shift, 0.5),
    )
    labels, order = torch.zeros(count, dtype=torch.long), torch.arange(4).expand(count, -1)
    call = Call(FourTokens(), labels, order, Sampling(), draws(count, seed))
    run = Rounds(call, target, draft, rule, lambda tally: length, Report(()), prefilled)
    return target.innovations(run()), run


def worst(innovations):
    """The smallest p-value of: each token is standard normal; each two are uncorrelated; all of them together."""
    lagged = [(one * other).mean() * len(one) ** 0.5 for one, other in pairwise(innovations.unbind(1))]
    normal = torch.distributions.Normal(0.0, 1.0)
    uncorrelated = [2 * float(normal.cdf(-value.abs())) for value in lagged]
    return min([ks(token) for token in innovations.unbind(1)] + uncorrelated + [ks(innovations)])


@pytest.mark.parametrize("rule", [TrajectoryRule(Ledger()), BoundedRule(0.0)], ids=["exact", "within nothing"])
@pytest.mark.parametrize("length", [1, 3])
def test_speculation_draws_the_targets_joint_law(rule, length):
    innovations, run = gaussian_rounds(rule, length=length, prefilled=1 if length == 1 else 0)
    assert worst(innovations) > 1e-3
    if length == 3 and isinstance(rule, TrajectoryRule):
        assert len(set(run.target.calls)) > 1  # rows went on at their own pace


def test_the_published_test_of_drafts_does_not():
    innovations, _ = gaussian_rounds(PublishedRule(1.0, Ledger()))
    assert worst(innovations) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 4])
def test_it_still_does_with_two_hundred_thousand_images(length):
    innovations, _ = gaussian_rounds(TrajectoryRule(Ledger()), 200_000, length)
    assert worst(innovations) > 1e-3


SMALL = {"grid": 2, "channels": 1, "latent_scale": 1.0, "hidden_size": 16, "head_width": 16, "encoder_layers": 1}
IMAGES = 1500


@pytest.mark.parametrize("attention", ["causal", "masked"])
@exact_modes
def test_images_of_real_models_are_distributed_as_plain_ones(mode, attention):
    """And the draft's own images, and half of what speculation draws, are told apart by the same test."""
    model, draft = pair(mode, 0.1, attention=attention, **SMALL)
    arguments = {"labels": [2], "num_images": IMAGES, "guidance": 1.5}
    plain, other, drafted = (
        one.generate(**arguments, generator=torch.Generator().manual_seed(seed))
        for one, seed in ((model, 1), (model, 2), (draft, 3))
    )
    with mmaccel.applied(model, speculation(mode, draft, length=3, prefill=0.0)) as run:
        speculated = model.generate(**arguments, generator=torch.Generator().manual_seed(4))
    assert 0.02 < run.report["acceptance"] < 0.97
    assert energy_test(plain, drafted)[1] < 0.01
    assert energy_test(plain, other)[1] > 0.01
    assert energy_test(plain, speculated)[1] > 0.01


def test_images_of_the_published_mode_are_not():
    model, draft = pair("exact", 0.1, attention="masked", **SMALL)
    arguments = {"labels": [2], "num_images": IMAGES}
    plain = model.generate(**arguments, generator=torch.Generator().manual_seed(1))
    with mmaccel.applied(model, speculation("published", draft, length=3, prefill=0.0)):
        speculated = model.generate(**arguments, generator=torch.Generator().manual_seed(4))
    assert energy_test(plain, speculated)[1] < 0.01


@every_mode
@pytest.mark.parametrize("attention", ["causal", "masked"])
def test_without_drafts_it_is_plain_generation_bit_for_bit(mode, attention):
    model, draft = pair(mode, attention=attention)
    plain = model.generate([3, 7], generator=seeds(1, 2), guidance=2.0)
    with mmaccel.applied(model, speculation(mode, draft, length=0)) as run:
        assert torch.equal(model.generate([3, 7], generator=seeds(1, 2), guidance=2.0), plain)
        assert run.report["draft_backbone_calls"] == 0


@every_mode
@pytest.mark.parametrize("attention", ["causal", "masked"])
def test_the_target_as_its_own_draft_is_never_refused_and_draws_what_it_draws(mode, attention):
    model, _ = pair(mode, attention=attention)
    model = model.double()
    plain = model.generate([3, 7], generator=seeds(1, 2), guidance=2.0)
    with mmaccel.applied(model, speculation(mode, model, prefill=0.0)) as run:
        found = model.generate([3, 7], generator=seeds(1, 2), guidance=2.0)
    assert torch.allclose(found, plain, atol=1e-8)
    assert run.report["acceptance"] == 1.0
    assert run.report["tokens_a_round"] == 4.5  # nine tokens: five, then three drafts and the last


@every_mode
@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0, "temperature": 0.9}], ids=["plain", "guided"])
def test_a_batch_draws_what_its_rows_draw_alone(mode, settings):
    model, draft = pair(mode, 0.05)
    model, draft = model.double(), draft.double()
    with mmaccel.applied(model, speculation(mode, draft)) as run:
        batch = model.generate([3, 7], 4, generator=seeds(1, 2, 3, 4), **settings)
        assert run.report["acceptance"] < 1
        for row, label in enumerate((3, 3, 7, 7)):
            alone = model.generate([label], generator=seeds(row + 1), **settings)
            assert torch.allclose(alone[0], batch[row], atol=1e-8)


def test_a_masked_batch_does_too():
    model, draft = pair("exact", 0.05, attention="masked")
    model, draft = model.double(), draft.double()
    with mmaccel.applied(model, speculation("exact", draft)):
        batch = model.generate([3, 7], generator=seeds(1, 2), guidance=2.0)
        for row, label in enumerate((3, 7)):
            alone = model.generate([label], generator=seeds(row + 1), guidance=2.0)
            assert torch.allclose(alone[0], batch[row], atol=1e-8)


def test_the_report_counts_what_an_outside_counter_sees():
    model, draft = pair("exact", 0.05)
    seen = {}

    def count(name):
        return lambda *_: seen.__setitem__(name, seen.get(name, 0) + 1)

    handles = [
        module.register_forward_hook(count(f"{who}_{part}_calls"))
        for who, one in (("target", model), ("draft", draft))
        for part, module in (("backbone", one.backbone), ("head", one.head))
    ]
    with mmaccel.applied(model, speculation("exact", draft, length=3)) as run:
        model.generate([3, 7], generator=seeds(1, 2))
    for handle in handles:
        handle.remove()
    report = run.report
    assert {name: report[name] for name in seen} == seen
    assert report.to_dict()["target_backbone_calls_dense"] == 9 and report.to_dict()["target_head_calls_dense"] == 27
    origins = report.details["origins"]
    assert origins.shape == (2, 3, 3) and (origins.flatten(1)[:, 0] == PLAIN).all()
    kept, ends = int((origins == KEPT).sum()), int(((origins == REDRAWN) | (origins == BONUS)).sum())
    assert report["tokens_a_round"] == pytest.approx(
        (kept + ends + int((origins == PLAIN).sum()) - 2) / report["rounds"]
    )
    assert report["speed_up"] > 0 and report["predicted_speed_up"] > 0 and "acceptance: 0." in str(report)
    assert set(report.seconds) == {"prefill", "draft", "verify", "redraw"}


def test_removing_gives_the_model_back_and_the_second_call_is_the_first():
    model, draft = pair("exact", 0.05)
    plain, before = model.generate([3], generator=seeds(1)), set(vars(model))
    mmaccel.apply(model, speculation("exact", draft))
    first, second = (model.generate([3], generator=seeds(1)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, plain)
    mmaccel.remove(model)
    assert set(vars(model)) == before and torch.equal(model.generate([3], generator=seeds(1)), plain)


def test_an_unguided_draft_costs_half_and_serves_a_guided_target():
    model, draft = pair("exact", 0.0)
    rows = {}
    for guided in (True, False):
        with mmaccel.applied(model, speculation("exact", draft, guide_draft=guided, length=1)) as run:
            model.generate([3], generator=seeds(1), guidance=3.0)
        rows[guided] = run.report.to_dict()["rows"]["draft_backbone_rows"] / run.report["draft_backbone_calls"]
    assert rows == {True: 2, False: 1}


def test_an_adaptive_length_pays():
    tally = Tally(torch.zeros(1, 4, dtype=torch.long), rounds=10, drafted=40, tested=30, kept=27)
    cheap, dear = ([(n, 1.0 + n * draft) for n in (4, 1, 4, 1)] for draft in (0.01, 1.0))
    assert best_length(replace(tally, timed=cheap), None) == 16 and best_length(replace(tally, timed=dear), None) == 1
    assert best_length(replace(tally, timed=cheap, kept=3), None) < 4
    assert best_length(replace(tally, timed=dear), 0.5) == 0 and best_length(replace(tally, timed=cheap), 0.5) == 16
    assert [best_length(replace(tally, timed=cheap[:n]), 0.5) for n in range(4)] == [4, 1, 4, 1]
    assert tokens_a_round(0.5, 2) == 1.75 and tokens_a_round(1.0, 4) == 5 and tokens_a_round(0.0, 4) == 1
    model, draft = pair("exact", 0.0)
    with mmaccel.applied(model, speculation("exact", draft, length="adaptive")) as run:
        model.generate([3], generator=seeds(1))
    assert run.report["acceptance"] > 0.9


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("attention", ["causal", "masked"])
def test_a_draft_without_a_backbone_reads_the_targets_conditions(attention, guided):
    """It costs no backbone call but one a token; images are distributed as plain ones, whatever it draws."""
    model = tiny(attention=attention, **SMALL)
    draft = tiny(**{**SMALL, "attention": "shared", "head_width": 12}, seed=4, spread=0.3)
    arguments = {"labels": [2], "num_images": IMAGES, "guidance": 1.5}
    plain = model.generate(**arguments, generator=torch.Generator().manual_seed(1))
    with mmaccel.applied(model, speculation("exact", draft, length=2, guide_draft=guided, sweeps=2)) as run:
        found = model.generate(**arguments, generator=torch.Generator().manual_seed(5))
        assert 0.02 < run.report["acceptance"] < 0.97
        one = model.generate([3], generator=seeds(1))
        assert run.report["draft_backbone_calls"] == 0
        assert torch.equal(model.generate([3], generator=seeds(1)), one)
    assert energy_test(plain, found)[1] > 0.01
    if attention == "causal" and guided:
        same = tiny(**{**SMALL, "attention": "shared"})
        same.head.load_state_dict(model.head.state_dict())
        with mmaccel.applied(model, speculation("exact", same, length=2)) as run:
            alike = model.generate([3], generator=seeds(1))
        assert run.report["acceptance"] == 1.0 and run.report["target_backbone_calls"] == 4
        assert torch.allclose(alike, model.generate([3], generator=seeds(1)), atol=1e-5)
        with pytest.raises(ValueError, match='this model has attention="shared": it is a head without a backbone'):
            draft.generate([3])
        with pytest.raises(Unsupported, match="draft and target need the same hidden_size; got 16 and 32"):
            mmaccel.apply(tiny(grid=2, channels=1, latent_scale=1.0), ContinuousSpeculation(draft=draft))


def test_a_batch_with_sweeps_draws_what_its_rows_draw_alone():
    model, draft = (one.double() for one in pair("exact", 0.02, diffusion_steps=6))
    with mmaccel.applied(model, speculation("exact", draft, sweeps=5)) as run:
        batch = model.generate([3, 7], 4, generator=seeds(1, 2, 3, 4), guidance=2.0)
        assert 0 < run.report["acceptance"] < 1
        for row, label in enumerate((3, 3, 7, 7)):
            alone = model.generate([label], generator=seeds(row + 1), guidance=2.0)
            assert torch.allclose(alone[0], batch[row], atol=1e-8)


RUNS = sorted({key.rpartition(".")[0] for key in load("cspd/runner_trace")[0] if key.endswith(".ratio")})


@pytest.mark.parametrize("case", RUNS)
def test_the_published_loop_is_the_official_one(case):
    """Draft tokens, ratios and decisions of every block; what replaced a rejected token is given."""
    golden, _ = load("cspd/runner_trace")
    given = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    length, prefill, guidance, softening = (
        float(part)
        for part in case.replace("gamma", "")
        .replace(".prefill", " ")
        .replace(".cfg", " ")
        .replace(".inner", " ")
        .split()
    )
    order = golden["orders"].flip(1)
    numbers = [
        number.gather(1, order[:, step, None, None].expand(-1, 1, 4))[:, 0]
        for step in range(16)
        for number in (golden["noise"], *golden["inter_noise"].unbind(2)[:0:-1])
    ]
    blocks, done = [], int(prefill * 16) + 1
    for size in given["n_per_verify"].tolist():  # the release goes through positions, image by image
        places = order[:, done : done + size // 4]
        blocks.append(places.argsort(dim=1).argsort(dim=1).add(torch.arange(4)[:, None] * (size // 4)).T.flatten())
        done += size // 4
    parts = {name: iter(given[name].split(given["n_per_verify"].tolist())) for name in ("ratio", "u", "draft", "out")}
    here = iter(blocks)
    uniforms = []

    class Replayed(PublishedRule):
        def verify(self, drafted, p, q):
            verdict, block = super().verify(drafted, p, q), next(here)
            ratio, u, draft, out = (next(parts[name])[block] for name in ("ratio", "u", "draft", "out"))
            assert torch.allclose(drafted.token, draft, atol=2e-3)
            log_ratio = ratio.double().log()
            sound = log_ratio.isfinite() & (log_ratio.abs() < 60)
            assert torch.allclose(verdict.log_ratio[sound], log_ratio[sound], rtol=0.02, atol=0.05)
            uniforms.append(u.double())
            return Verdict(log_ratio.nan_to_num(neginf=-1e9), lambda chosen, stream: out[chosen])

    class Uniforms:
        def at(self, rows):
            return self

        def uniform(self):
            return uniforms.pop(0)

    target, draft = published("target"), published("draft")
    call = Call(target, torch.arange(4), order, Sampling(guidance, "constant"), Recorded(*numbers, other=Uniforms()))
    runs = [call.run(one, name, Ledger()) for one, name in ((target, "target"), (draft, "draft"))]
    with torch.no_grad():
        tokens, tally = published_tokens(call, *runs, Replayed(softening, Ledger()), int(length), prefill, Report(()))
    assert torch.allclose(call.latents(tokens), given["tokens"], atol=2e-3)
    assert tally.acceptance == pytest.approx(float(given["accept_rate"]), abs=1e-6)


REFUSED = [
    (
        {"token_size": None, "channels": 3},
        {},
        r"draft and target need the same token_size; got 3 and 2. Distil a draft",
    ),
    ({"grid": 2}, {}, "need the same grid; got 2 and 3"),
    ({"classes": 9}, {}, "need the same classes; got 9 and 10"),
    ({"noise_schedule": "cosine"}, {}, "need the same noise_schedule; got 'cosine' and 'log-snr'"),
    ({"variance": "fixed-small"}, {}, "need the same variance; got 'fixed-small' and 'fixed-large'"),
    ({"head": "mixture"}, {}, "need the same head; got 'mixture' and 'diffusion'"),
    ({"noisy_end": False}, {}, "need the same noisy_end; got False and True"),
    ({}, {"mode": "mixture"}, "mode='mixture' does not fit diffusion heads; take mode=\"exact\""),
    ({}, {"mode": "published"}, 'mode="published" predicts a block from what lies before it, as only masked models'),
]


@pytest.mark.parametrize(("draft", "settings", "message"), REFUSED)
def test_a_pair_that_cannot_work_is_refused_by_name(draft, settings, message):
    draft = {key: value for key, value in draft.items() if value is not None}
    with pytest.raises(Unsupported, match=message):
        mmaccel.apply(tiny(), ContinuousSpeculation(draft=tiny(**draft), **settings))


def test_more_pairs_are_refused():
    quiet = tiny(noisy_end=False)
    with pytest.raises(Unsupported, match=r"a last denoising step that draws noise; .*config.noisy_end = True in both"):
        mmaccel.apply(quiet, ContinuousSpeculation(draft=quiet))
    mmaccel.remove(mmaccel.apply(quiet, ContinuousSpeculation(draft=quiet, mode="bounded", tau=0.1)))
    with pytest.raises(Unsupported, match="a causal draft draws in raster order, and this masked target in any"):
        mmaccel.apply(tiny(attention="masked"), ContinuousSpeculation(draft=tiny()))
    with pytest.raises(Unsupported, match=r'does not fit mixture heads; take mode="mixture", which is exact'):
        mmaccel.apply(tiny(head="mixture"), ContinuousSpeculation(draft=tiny(head="mixture")))
    with pytest.raises(Unsupported, match=r"speeds up MARModel, .*got Linear. For models of discrete tokens"):
        mmaccel.apply(torch.nn.Linear(2, 2), ContinuousSpeculation(draft=tiny()))
    masked = tiny(attention="masked")
    with (
        mmaccel.applied(masked, ContinuousSpeculation(draft=near(masked))),
        pytest.raises(Unsupported, match="draws one token a step, 9 in all, and steps=4 is another distribution"),
    ):
        masked.generate([3], steps=4)


def test_a_head_that_gives_no_number_is_found_out_in_either_model():
    for spoilt in (0, 1):
        models = pair("exact")
        models[spoilt].head.output.bias.data.fill_(torch.nan)
        with (
            mmaccel.applied(models[0], speculation("exact", models[1], prefill=0.0)),
            pytest.raises(ValueError, match=r"not finite: |one of their heads gives NaN"),
        ):
            models[0].generate([3], generator=seeds(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": -1}, "length is a number of tokens from 0 up, or 'adaptive'; got -1"),
        ({"prefill": 1.5}, "prefill is the share of the tokens that the target draws alone; got 1.5"),
        ({"mode": "bounded"}, 'tau, a distance from 0 up, belongs to mode="bounded" and to no other; got tau=None'),
        ({"sweeps": 0}, "sweeps is a number of calls from 1 up, or None for a call a step; got 0"),
        ({"tau": 0.1}, "got tau=0.1 with mode='exact'"),
        ({"mode": "bounded", "tau": -1.0}, "tau is a distance from 0 up; got -1.0"),
        ({"mode": "published", "length": "adaptive"}, "has blocks of one length from 1 up; got length='adaptive'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ContinuousSpeculation(draft="folder", **settings)


def test_a_draft_is_written_down_by_its_folder(tmp_path):
    model, draft = pair("exact")
    with pytest.raises(ValueError, match="not loaded from a folder, so it cannot be written down; save it"):
        ContinuousSpeculation(draft=draft).to_dict()
    draft.save_pretrained(tmp_path)
    method = ContinuousSpeculation.from_dict({"method": "continuous-speculation", "draft": str(tmp_path)})
    assert method.to_dict()["draft"] == str(tmp_path)
    loaded = type(draft).from_pretrained(tmp_path)
    assert ContinuousSpeculation(draft=loaded).to_dict() == method.to_dict()
    found = []
    for one in (method, ContinuousSpeculation(draft=draft)):
        with mmaccel.applied(model, one):
            found.append(model.generate([3], generator=seeds(1)))
    assert torch.allclose(*found, atol=1e-4)
    with pytest.raises(ValueError, match="a draft is a MARModel, or the folder of one"):
        ContinuousSpeculation.from_dict({"draft": 3})
    with pytest.raises(
        FileNotFoundError, match=r"there is no model 'nowhere'; give a folder that model.save_pretrained"
    ):
        mmaccel.apply(model, ContinuousSpeculation(draft="nowhere"))


@every_mode
def test_check_finds_every_law_kept(mode):
    model, draft = pair(mode, 0.05)
    report = check(model, speculation(mode, draft), inputs={"labels": [3, 7]})
    assert report.passed, str(report)
    assert len(report.laws) == 5


def test_check_finds_a_broken_law():
    model, draft = pair("exact", 0.05)
    calls = []
    forward = model.head.forward
    model.head.forward = lambda *given: forward(*given) + 1e-2 * (calls.append(1) or len(calls) % 7)
    report = check(model, dataclasses.replace(speculation("exact", draft)), inputs={"labels": [3]})
    assert not report.passed


def test_the_command_checks_a_folder_with_a_draft_in_another(tmp_path):
    model, draft = pair("exact", 0.05)
    model.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    found = ["check", str(tmp_path / "target"), "continuous-speculation", "--set"]
    result = CliRunner().invoke(app, [*found, f"draft={tmp_path / 'draft'}"])
    assert result.exit_code == 0 and "passed" in result.stdout, result.stderr
    result = CliRunner().invoke(app, [*found, "draft=nowhere"])
    assert result.exit_code == 2 and "there is no model 'nowhere'" in result.stderr
