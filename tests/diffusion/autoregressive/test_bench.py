"""`mmaccel bench ar`: its figures follow from what was counted, and its test of distributions sees what is wrong."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from diffusion.autoregressive import bench_lossless
from diffusion.autoregressive.bench_settings import method
from diffusion.autoregressive.bench_speed import alone
from diffusion.autoregressive.lengths import tokens_a_round
from diffusion.autoregressive.painters import load_painter
from mmaccel.bench import get_bench
from mmaccel.cli import app
from tests.diffusion.autoregressive import folders
from tests.diffusion.autoregressive.tiny import seeds, tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return str(folders.continuous(tmp_path_factory.mktemp("mar"), distance=0.1))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return str(folders.discrete(tmp_path_factory.mktemp("imagegpt")))


def bench(**options):
    return get_bench("ar").from_options({"rounds": 2, **options})


def test_continuous_tokens_are_measured_against_plain_and_against_their_limit(pair, tmp_path):
    found = bench(model=pair, settings="exact.2,exact.adaptive", batches="2", guidance=1.5, rounds=1)
    result = found.run()
    rows = {(row["setting"], row["batch"]): row for row in result.rows}
    assert set(rows) == {(name, 2) for name in ("plain", "draft", "exact.2", "exact.adaptive")}
    row, figures = rows["exact.2", 2], result.figures
    assert len(row["seconds"]) == 1 and row["prefilled"] == 1
    accepted = figures["acceptance.exact.2.batch_2"].value
    assert 0 < accepted < 1
    ratio = figures["seconds.draft.batch_2"].value / figures["seconds.plain.batch_2"].value
    (length,) = row["drafts_a_round"]
    by_hand = 9 / (1 + 8 / tokens_a_round(accepted, length) * (1 + length * ratio))
    assert figures["limit.exact.2.batch_2"].value == pytest.approx(by_hand)
    assert 0 < figures["compute_bound.exact.2.batch_2"].value < 1
    found.plot(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 5000


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_without_drafts_the_limits_are_plain_generation(pair, guidance):
    options = {"settings": "exact.0", "batches": "2", "rounds": 1, "guidance": guidance, "prefill": 0.5}
    result = bench(model=pair, **options).run()
    assert next(row["prefilled"] for row in result.rows if row["setting"] == "exact.0") == 5
    figures = result.figures
    assert figures["compute_bound.exact.0.batch_2"].value == pytest.approx(1)
    assert figures["limit.exact.0.batch_2"].value == pytest.approx(1)


def test_discrete_tokens_are_counted_by_passes_and_compared_token_for_token(words):
    result = bench(model=words, part="discrete", settings="coupled.4,gumbel.4", batches="1").run()
    row = next(row for row in result.rows if row["setting"] == "coupled.4")
    assert row["tokens_a_pass"] == [9 / passes for passes in row["passes"]]
    assert result.figures["fewer_passes.coupled.4.batch_1"].value == sum(row["tokens_a_pass"]) / 2
    assert result.figures["different.gumbel.4.batch_1"].value == 0
    assert "different.coupled.4.batch_1" not in result.figures


def test_rows_side_by_side_say_what_was_missing_and_how_far_pictures_are_from_plain_ones(words):
    options = {"model": words, "settings": "zipar.1,zipar.3,zipar-adaptive.1"}
    figures = bench(part="discrete", batches="1", **options).run().figures
    assert figures["fewer_passes.zipar.1.batch_1"].value == 9 / 5 and figures["fewer_passes.zipar.3.batch_1"].value == 1
    assert figures["missing.zipar.1.batch_1"].value == 7 / 36 > figures["missing.zipar-adaptive.1.batch_1"].value
    assert figures["missing.zipar.3.batch_1"].value == 0
    figures = bench(part="lossless", batches="200", images=200, **options).run().figures
    assert figures["distance.zipar.1"].value > figures["distance.zipar.3"].value
    assert figures["p.zipar.3"].value > 0.01


def test_the_published_mode_draws_with_a_masked_model_of_the_same_sizes(pair):
    options = {"settings": "published.3", "batches": "300", "rounds": 1, "images": 300}
    figures = bench(model=pair, part="published", **options).run().figures
    assert figures["speed_up.published.3.batch_300"].value > 0
    assert figures["p.plain_again"].value > 0.01 > figures["p.published.3"].value
    assert "limit.published.3.batch_300" not in figures  # it goes on behind a rejection


def test_pictures_of_an_exact_mode_are_told_from_plain_ones_no_better_than_plain_ones_are(pair, words):
    for part, setting in ((pair, "exact.3"), (words, "coupled.4")):
        figures = bench(part="lossless", model=part, settings=setting, batches="200", images=200).run().figures
        assert min(figures["p.plain_again"].value, figures[f"p.{setting}"].value) > 0.01
        assert f"speed_up.{setting}.batch_200" not in figures


def test_a_draft_without_a_backbone_is_timed_over_the_targets():
    target, draft = tiny(), tiny(attention="shared", head_width=12)
    whole = alone(draft, target)
    assert whole.head is draft.head and whole.backbone is target.backbone and alone(target, target) is target
    assert whole.generate([3], generator=seeds(1)).isfinite().all()


def test_pictures_that_are_there_are_not_drawn_again(words, tmp_path, monkeypatch):
    options = bench(part="lossless", model=words, settings="coupled.4", batches="4", images=8, folder=str(tmp_path))
    first = options.run()
    more = replace(options, images=10)
    numbers = []

    def counted(painter, method, batch, seed, call, told, some, plain=bench_lossless.drawn):
        numbers.extend(some)
        return plain(painter, method, batch, seed, call, told, some)

    monkeypatch.setattr(bench_lossless, "drawn", counted)
    assert options.run().figures == first.figures and not numbers
    more.run()
    assert numbers == [8, 9] * 3
    assert len(json.loads((tmp_path / "plain.jsonl").read_text().splitlines()[1])["numbers"]) == 3 * 6 * 6


def test_what_cannot_be_measured_is_refused(pair, words, tmp_path):
    painter = load_painter(pair)
    for name, message in (
        (
            "exact",
            r"MODE.LENGTH \(exact.4, exact.adaptive\), REDRAW.WINDOW \(coupled.16\) or zipar.WINDOW; got 'exact'",
        ),
        ("coupled.4", "got 'coupled.4': .*mode"),
    ):
        with pytest.raises(ValueError, match=message):
            method(painter, name)
    with pytest.raises(ValueError, match=r"got 'exact.4': .*redraw"):
        method(load_painter(words), "exact.4")
    with pytest.raises(ValueError, match="the published mode drafts continuous tokens; give a MARModel with its draft"):
        bench(part="published", model=words).run()
    with pytest.raises(ValueError, match="batches are whole numbers with commas between; got 'one'"):
        bench(batches="one")
    with pytest.raises(ValueError, match="rounds, images and batches are at least 1; got 0, 2000 and 1,16"):
        bench(rounds=0)
    lossless = bench(part="lossless", model=words, settings="coupled.4", batches="4", images=4)
    with pytest.raises(ValueError, match="the plot shows times, and this run tested distributions"):
        lossless.plot(lossless.run(), tmp_path / "a.png")


def test_the_command_writes_figures_and_plot(words, tmp_path):
    arguments = ["part=discrete", f"model={words}", "settings=coupled.4,coupled.8", "batches=1", "rounds=1"]
    settings = [word for argument in arguments for word in ("--set", argument)]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    result = CliRunner().invoke(app, ["bench", "ar", *settings, *files])
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "a.json").read_text())["figures"]["fewer_passes.coupled.4.batch_1"]["value"] >= 1
    assert (tmp_path / "a.png").stat().st_size > 5000
