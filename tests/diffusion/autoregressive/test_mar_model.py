"""The model family: the official numbers, caches, batches, checkpoints, and clear errors."""

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from diffusion.autoregressive import MARConfig, MARModel
from diffusion.autoregressive.convert import convert_mar, from_published
from diffusion.autoregressive.heads import DiffusionLaw
from diffusion.autoregressive.noise_schedule import respaced
from diffusion.autoregressive.orders import guidance_by_token, tokens_a_step
from diffusion.autoregressive.passes import ModelRun
from diffusion.autoregressive.sampling import Call, plain_tokens
from diffusion.autoregressive.settings import Sampling
from mmaccel.cli import app
from mmaccel.ledger import Ledger
from tests.diffusion.autoregressive.tiny import SHAPE, Recorded, published, seeds, tiny
from tests.vision_tokens.golden import load

KINDS = [("causal", "diffusion"), ("causal", "mixture"), ("masked", "diffusion"), ("masked", "mixture")]
kinds = pytest.mark.parametrize(("attention", "head"), KINDS)


@pytest.mark.parametrize(
    "case", sorted({key.rpartition(".")[0] for key in load("mar_model/schedules")[0] if key[0] == "L"})
)
def test_masks_and_guidance_follow_the_official_schedule(case):
    golden, _ = load("mar_model/schedules")
    tokens, steps = (int(part.lstrip("Liter")) for part in case.split("."))
    assert tokens_a_step(tokens, steps) == golden[f"{case}.n_pred"].tolist()
    first = golden[f"{case}.n_pred"].cumsum(0) - golden[f"{case}.n_pred"]
    assert torch.allclose(guidance_by_token(3.0, "linear", tokens, steps)[first], golden[f"{case}.cfg_linear3"])


@pytest.mark.parametrize("steps", [10, 25, 50, 100])
def test_respaced_noise_levels_are_the_official_ones(steps):
    golden, _ = load("mar_model/schedules")
    made = respaced("cosine", steps)
    for name, value in {
        "timestep_map": made.times,
        "alphas_cumprod": made.alpha_products,
        "betas": made.betas,
        "posterior_mean_coef1": made.x0_weight,
        "posterior_mean_coef2": made.x_weight,
        "posterior_log_variance_clipped": made.posterior_variance.log(),
    }.items():
        assert torch.allclose(value, golden[f"T{steps}.{name}"].double(), rtol=1e-9, atol=1e-12), name


def test_conditions_are_the_official_ones():
    golden, _ = load("mar_model/mar_tiny")
    model, visible = published("target"), golden["encdec.mask"] == 0
    for labels, name in ((golden["labels"], "z"), (torch.full((4,), -1), "z_uncond")):
        made = model(golden["encdec.tokens"], labels, visible)
        assert torch.allclose(made, golden[f"encdec.{name}"], atol=1e-5)


@pytest.mark.parametrize("steps", [6, 16])
@pytest.mark.parametrize(("guidance", "schedule"), [(1.0, "linear"), (2.5, "linear"), (2.5, "constant")])
def test_sampling_is_the_official_one(guidance, schedule, steps):
    """Tokens appear from the end of the official order, whose noise belongs to positions."""
    golden, _ = load("mar_model/mar_tiny")
    model, order = published("target"), golden["orders"].flip(1)
    given, done = [], 0
    for count in tokens_a_step(16, steps):
        places = order[:, done : done + count]
        for noise in (golden["noise"], *golden["inter_noise"].unbind(2)[:0:-1]):  # none at the last step
            given.append(noise.gather(1, places[..., None].expand(-1, -1, 4)).flatten(0, 1))
        done += count
    call = Call(model, golden["labels"], order, Sampling(guidance, schedule, steps=steps), Recorded(*given))
    latents = call.latents(plain_tokens(call, call.run(model, "target", Ledger())))
    expected = golden[f"sample.cfg{guidance}.{schedule}.iter{steps}.unpatchified"]
    assert torch.allclose(latents, expected, atol=1e-3)
    assert not call.randomness.numbers


@kinds
def test_a_checkpoint_draws_what_the_model_drew(tmp_path, attention, head):
    model = tiny(attention=attention, head=head)
    model.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.glob("model*")] == [".safetensors"]
    again = MARModel.from_pretrained(tmp_path)
    first, second = (one.generate([1, 2], generator=seeds(1, 2)) for one in (model, again))
    assert first.shape == (2, 2, 3, 3) and torch.equal(first, second)


@kinds
@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0, "temperature": 0.9}], ids=["plain", "guided"])
def test_a_batch_draws_what_its_rows_draw_alone(attention, head, settings):
    model = tiny(attention=attention, head=head).double()
    batch = model.generate([3, 7], 4, generator=seeds(1, 2, 3, 4), **settings)
    alone = [
        model.generate([label], generator=seeds(seed), **settings) for label, seed in ((3, 1), (3, 2), (7, 3), (7, 4))
    ]
    assert torch.allclose(batch, torch.cat(alone), atol=1e-9)
    assert (batch[0] - batch[1]).abs().max() > 0.1 and (batch[1] - batch[2]).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("attention", ["causal", "masked"])
def test_conditions_from_a_run_are_those_of_a_pass_over_everything(attention, guidance):
    """Rows at different lengths, going back and forth, against `forward`, which has no cache."""
    model, tokens = tiny(attention=attention), torch.randn(3, 9, 2)
    order = (
        torch.stack([torch.randperm(9) for _ in range(3)]) if attention == "masked" else torch.arange(9).expand(3, -1)
    )
    run = ModelRun(model, "target", torch.tensor([1, 4, 9]), order, Sampling(guidance), Ledger())
    for rows, start, count in (
        ([0, 1, 2], [0, 0, 0], [1, 1, 1]),
        ([0, 1, 2], [1, 1, 1], [4, 2, 3]),
        ([0, 1, 2], [5, 2, 3], [1, 3, 2]),
        ([0, 2], [3, 5], [2, 4]),
        ([1], [5], [4]),
    ):
        rows, start, count = torch.tensor(rows), torch.tensor(start), torch.tensor(count)
        tokens[rows[:, None], start[:, None] + torch.arange(1)] = torch.randn(len(rows), 1, 2)
        found = run.conditions(tokens, rows, start, count)
        for branch, label in enumerate([torch.tensor([1, 4, 9]), torch.full((3,), -1)][: run.branches]):
            for number, row in enumerate(rows.tolist()):
                for step in range(count[number]):
                    place = int(start[number]) + step
                    spatial = torch.zeros(1, 9, 2)
                    spatial[0, order[row, :place]] = tokens[row, :place]
                    visible = torch.zeros(1, 9, dtype=torch.bool)
                    visible[0, order[row, :place]] = True
                    expected = model(spatial, label[row : row + 1], visible)[0, order[row, place]]
                    assert torch.allclose(found[branch, number, step], expected, atol=1e-5)


@pytest.mark.parametrize("variance", ["learned", "fixed-large", "fixed-small"])
@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_both_predictions_mean_the_same_step(prediction, variance):
    """A head that predicts what Gaussian data of std 0.6 calls for keeps the data's marginals, level by level."""
    std, schedule = 0.6, respaced("log-snr", 200)
    head = tiny(prediction=prediction, variance=variance).head

    def perfect(state, modulations):
        signal, noise = schedule.alpha_products[level].sqrt(), (1 - schedule.alpha_products[level]).sqrt()
        clean = signal * std**2 / (signal**2 * std**2 + noise**2) * state
        epsilon = (state - signal * clean) / noise
        made = epsilon if prediction == "epsilon" else signal * epsilon - noise * clean
        return torch.cat([made, torch.ones_like(made)], dim=-1) if variance == "learned" else made

    head.forward = perfect
    law = head.double().laws(1.0, 200)(torch.zeros(1, 1, 32, dtype=torch.float64), torch.ones(1))
    assert isinstance(law, DiffusionLaw)
    spread = torch.tensor(1.0, dtype=torch.float64)  # variance of the state
    for level in range(199, -1, -1):
        at_one = law(torch.ones(1, 1, 2, dtype=torch.float64), torch.tensor([level]))
        spread = at_one.mean[0, 0, 0] ** 2 * spread + at_one.std[0, 0, 0] ** 2
    assert float(spread.sqrt()) == pytest.approx(std, rel=0.03)


@kinds
def test_training_lowers_the_loss(attention, head):
    model, generator = tiny(attention=attention, head=head, spread=0.05), seeds(0)[0]
    tokens, labels = torch.randn(1, 9, 2).expand(16, -1, -1), torch.zeros(16, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model.loss(tokens, labels, generator, repeats=2)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]) if losses[0] > 0 else losses[-1] < losses[0]


def test_published_weights_become_a_checkpoint(tmp_path):
    golden, _ = load("mar_model/mar_tiny")
    weights = {key.removeprefix("target."): value for key, value in golden.items() if key.startswith("target.")}
    torch.save({"model": {}, "model_ema": weights, "epoch": 3}, tmp_path / "mar.pth")
    made = convert_mar(tmp_path / "mar.pth", tmp_path / "mar", attention_heads=3)
    assert made.config.tokens == 16 and made.config.variance == "learned" and made.config.mlp_ratio == 2
    again = MARModel.from_pretrained(tmp_path / "mar")
    assert sum(value.numel() for value in weights.values()) == again.num_parameters()
    assert torch.equal(again.backbone.mask_token, weights["mask_token"])


class Danger:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Danger(), r"mar.pth cannot be read as tensors alone \(.*\); nothing in it was run"),
        ([1, 2], "holds list, not a dictionary of weights"),
        ({"a.weight": torch.zeros(2)}, "'a.weight' is no weight of MAR; is this the file of another model"),
        ({"mask_token": torch.zeros(1, 1, 2)}, r"the weights of MAR are not there \(backbone.embed.weight\)"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "mar.pth")
    with pytest.raises(ValueError, match=message):
        convert_mar(tmp_path / "mar.pth", tmp_path / "out")
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


def test_a_width_without_known_heads_asks_for_them():
    golden, _ = load("mar_model/mar_tiny")
    weights = {key.removeprefix("target."): value for key, value in golden.items() if key.startswith("target.")}
    with pytest.raises(ValueError, match=r"how many attention heads width 48 has; .*Pass attention_heads="):
        from_published(weights)
    del weights["decoder_norm.bias"]
    with pytest.raises(ValueError, match=r"1 weights do not fit the model, e.g. backbone.decoder_norm.bias"):
        from_published(weights, attention_heads=3)


def test_the_command_says_what_is_missing(tmp_path):
    result = CliRunner().invoke(app, ["convert", "mar", str(tmp_path / "no.pth"), str(tmp_path)])
    assert result.exit_code == 2 and "there is no file" in result.stderr
    result = CliRunner().invoke(app, ["convert", "vqgan", "a.pth", "b"])
    assert result.exit_code == 2 and "mar is the only kind of model" in result.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": [3, 10]}, r"labels are classes from 0 to 9; got \[3, 10\]"),
        ({"labels": []}, r"labels are classes from 0 to 9; got \[\]"),
        ({"labels": [3, 7], "num_images": 5}, "got 5 for 2 labels. Pass a multiple of 2"),
        ({"labels": [3], "temperature": 0.0}, "temperature lies above 0; got 0.0: at 0 a token has no density"),
        ({"labels": [3], "guidance_schedule": "cosine"}, "guidance_schedule is 'linear' or 'constant'; got 'cosine'"),
        ({"labels": [3], "steps": 4}, "a causal model draws one token a step, 9 in all; got steps=4"),
        ({"labels": [3], "diffusion_steps": 1}, "a diffusion head takes 2 to 1000 steps a token; got 1"),
        ({"guidance": 2.0}, "guidance=2.0 leads towards a label, and labels=None has none"),
        ({"labels": [3], "generator": seeds(1, 2)}, "one generator, or one for each of the 1 images; got 2"),
    ],
)
def test_a_call_that_cannot_be_drawn_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(**call)


def test_more_that_is_refused():
    with pytest.raises(TypeError, match="generate has no setting 'guidence'; did you mean 'guidance'"):
        tiny().generate([3], guidence=2.0)
    with pytest.raises(ValueError, match="drawn in 1 to 9 steps; got 17"):
        tiny(attention="masked").generate([3], steps=17)
    with pytest.raises(ValueError, match="hidden_size is a multiple of attention_heads; got 32 and 3"):
        MARConfig(**{**SHAPE, "attention_heads": 3})
    with pytest.raises(ValueError, match="attention is one of masked, causal, shared; got 'mask'"):
        MARConfig(attention="mask")
    with pytest.raises(ValueError, match="a masked model needs visible"):
        tiny(attention="masked")(torch.zeros(1, 9, 2), torch.tensor([1]))
    with pytest.raises(ValueError, match='trained with a fixed variance here; set variance="fixed-large"'):
        tiny(variance="learned").loss(torch.zeros(1, 9, 2), torch.tensor([1]))


def test_a_head_that_draws_what_is_no_number_is_found_out():
    model = tiny()
    model.head.output.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"drew a token that is not finite: .*run the model in float32"):
        model.generate([3])


def test_settings_of_sampling_are_the_arguments_of_generate():
    assert [field.name for field in dataclasses.fields(Sampling)] == [
        "guidance", "guidance_schedule", "temperature", "steps", "diffusion_steps",
    ]  # fmt: skip
