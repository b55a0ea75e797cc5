"""The bench of searches: it goes on where it stopped, pairs what belongs together, and counts what was spent."""

import json
from dataclasses import replace

import numpy as np
import pytest

from diffusion import BestOfN, LatentBeamSearch, bench_samples
from diffusion.bench_samples import Setting, Settings, compare, measure
from diffusion.bench_settings import MODELS, images
from mmaccel.bench import BenchResult, describe_machine, get_bench
from tests.diffusion.tiny import PICTURE, TOKENS, brightness, fresh, stable_diffusion_3


@pytest.fixture
def small(monkeypatch):
    """Two searches of a tiny pipeline, by brightness."""
    pipe = fresh(stable_diffusion_3)
    made = []

    def quiet(model):
        made.append(model)
        return pipe

    monkeypatch.setattr(bench_samples, "quiet_pipeline", quiet)
    monkeypatch.setattr(bench_samples, "call_defaults", lambda model: {**PICTURE, "max_sequence_length": TOKENS})
    settings = Settings(
        model="tiny",
        prompts=lambda count: ["a red square"] * count,
        reward=brightness,
        judges={"dark": lambda prompt, picture: 1 - float(picture.mean())},
        settings={
            "plain.6": Setting(BestOfN(brightness, 1), 3),
            "best-of-n.24": Setting(BestOfN(brightness, 4), 3),
            "dlbs.20": Setting(LatentBeamSearch(brightness, 2, 2, 1, eta=1.0), 3),
        },
        baseline=lambda name: [] if name.startswith(("plain", "best")) else ["best-of-n.24"],
    )
    return settings, made


def test_every_setting_is_measured_and_compared_with_its_baseline(small):
    rows = measure(small[0], 3, None)
    assert [row["setting"] for row in rows] == ["plain.6"] * 3 + ["best-of-n.24"] * 3 + ["dlbs.20"] * 3
    assert [row["denoiser_rows"] for row in rows[::3]] == [6, 24, 2 * (2 + 2 * 2 * 2)]
    figures = compare(rows, small[0].baseline)
    by_hand = np.mean([dlbs["reward"] - best["reward"] for best, dlbs in zip(rows[3:6], rows[6:], strict=True)])
    assert figures["reward_over_best_of_n.dlbs.20"].value == pytest.approx(by_hand)
    assert figures["judge_dark.plain.6"].value == pytest.approx(1 - figures["reward.plain.6"].value, abs=1e-6)
    assert figures["denoiser_rows.dlbs.20"].value == 20
    assert figures["overhead.best-of-n.24"].value >= 1
    assert all(best["reward"] >= plain["reward"] - 1e-6 for plain, best in zip(rows[:3], rows[3:6], strict=True))


def test_a_bench_goes_on_where_it_stopped(small, tmp_path):
    settings, made = small
    first = measure(settings.only(["plain.6"]), 2, tmp_path)
    with (tmp_path / "plain.6.jsonl").open("a") as broken:
        broken.write('\n{"setting": "plain.6", "pai')  # killed while it wrote
    more = measure(settings.only(["plain.6"]), 3, tmp_path)
    assert more[:2] == first and more[2]["pair"] == 2 and made == ["tiny", "tiny"]
    assert measure(settings.only(["plain.6"]), 3, tmp_path) == more and made == ["tiny", "tiny"]
    json.dumps(more)


def test_an_unknown_setting_is_told_the_nearest(small):
    with pytest.raises(ValueError, match=r"no setting 'best-of-n.25'; did you mean 'best-of-n.24'"):
        small[0].only(["best-of-n.25"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("nfe", [100, 300, 500])
def test_no_plan_spends_more_than_its_budget(model, nfe):
    """By each method's own formula."""
    for name, setting in images([nfe], model).settings.items():
        search, steps = setting.search, setting.steps
        if isinstance(search, BestOfN) and search.n > 1:
            assert MODELS[model] * search.n * steps == nfe, name
        if isinstance(search, LatentBeamSearch):
            searched = sum(search.searches(number, steps) for number in range(steps - 1))
            each = searched * search.candidates * search.lookahead + steps - searched
            assert 0.8 * nfe <= MODELS[model] * search.beams * each <= nfe and search.candidates > 1, name


def test_the_curve_is_drawn(tmp_path):
    from mmaccel.bench import Figure

    figures = {f"reward.{name}": Figure(0.5, 0.4, 0.6) for name in ("rbf.100", "rbf.300", "best-of-n.100")}
    bench = get_bench("diffusion").from_options({"pairs": 3})
    bench.plot(BenchResult("diffusion", describe_machine(), figures), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="at least one pair; got 0"):
        replace(bench, pairs=0)
