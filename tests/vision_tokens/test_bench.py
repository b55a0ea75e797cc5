"""The bench of visual-token methods: its oracle computes the same thing, and its figures add up."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mmaccel
from mmaccel.bench import BenchResult, get_bench
from mmaccel.methods import Method, get_method, list_methods
from mmaccel.pocket import world
from vision_tokens import AIM, FastV, FourierVLM, HiRED, PrefixKV, ToMe, bench_quality, bench_shapes, loading
from vision_tokens.bench_quality import Examination
from vision_tokens.bench_settings import has_oracle, methods_named
from vision_tokens.bench_shapes import SHAPES, TEXT_TOKENS, Shape
from vision_tokens.bench_speed import kv_bytes, peak_memory, runs_of
from vision_tokens.language_input import LanguageInputMethod
from vision_tokens.oracle import Oracle, read_by, twin

SMALL = {
    "vision_width": 64, "vision_layers": 3, "width": 64, "layers": 2, "feed_forward": 96, "vocabulary": 64,
    "pixels": 56, "head_width": 16,
}  # fmt: skip


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Shape]:
    shapes = {name: dataclasses.replace(SHAPES[name], **SMALL) for name in ("A", "B", "V")}
    monkeypatch.setattr(bench_shapes, "SHAPES", shapes)
    return shapes


@pytest.mark.parametrize("name", ["A", "B", "V"])
@pytest.mark.parametrize("method", [HiRED(budget=0.2), FourierVLM(budget=0.2), HiRED(budget=0.2, positions="packed")])
def test_the_oracle_computes_what_the_decorated_model_computes(
    name: str, method: LanguageInputMethod, small_shapes: dict[str, Shape]
) -> None:
    model, inputs = small_shapes[name].build(), small_shapes[name].inputs()
    decorated = mmaccel.apply(twin(model), method)
    options: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    ours = decorated.generate(**inputs, **options)
    oracle = Oracle(model, read_by(decorated, inputs)).generate(inputs, **options)
    dense = model.generate(**inputs, **options)
    assert len(oracle.logits) == 8
    torch.testing.assert_close(torch.stack(oracle.logits), torch.stack(ours.logits), atol=1e-5, rtol=0)
    assert (torch.stack(dense.logits) - torch.stack(ours.logits)).abs().max() > 1e-2
    assert kv_bytes(oracle.past_key_values) == kv_bytes(ours.past_key_values) < kv_bytes(dense.past_key_values)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "methods",
    [[FastV(budget=0.7)], [PrefixKV(budget=0.5)], [HiRED(budget=0.5), PrefixKV(budget=0.5)],
     [HiRED(budget=0.8), FastV(budget=0.7), PrefixKV(budget=0.5)]],
    ids=lambda methods: "+".join(method.name for method in methods),
)  # fmt: skip
def test_the_oracle_holds_in_every_layer_what_the_methods_leave_there(
    methods: list[Method], rows: int, small_shapes: dict[str, Shape]
) -> None:
    shape = dataclasses.replace(small_shapes["A"], layers=4)
    model, inputs = shape.build(), shape.inputs(rows=rows)
    decorated = mmaccel.apply(twin(model), *methods)
    options: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours = decorated.generate(**inputs, max_new_tokens=1, **options)
    oracle = Oracle(model, read_by(decorated, inputs))
    assert kv_bytes(oracle.generate(inputs, max_new_tokens=1, **options).past_key_values) == kv_bytes(
        ours.past_key_values
    )
    ours, bare = (run(max_new_tokens=2, **options) for run in (partial(decorated.generate, **inputs),
                                                               partial(oracle.generate, inputs)))  # fmt: skip
    dense = model.generate(**inputs, max_new_tokens=2, **options)
    torch.testing.assert_close(torch.stack(bare.logits), torch.stack(ours.logits), atol=1e-5, rtol=0)
    assert (dense.logits[1] - ours.logits[1]).abs().max() > 1e-3


def test_the_oracle_has_no_code_of_ours_in_its_way(small_shapes: dict[str, Shape]) -> None:
    model, inputs = small_shapes["A"].build(), small_shapes["A"].inputs()
    decorated = mmaccel.apply(twin(model), HiRED(budget=0.2))
    oracle = Oracle(model, read_by(decorated, inputs))
    assert oracle.language_model.model is model.model.language_model
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert not [name for name in vars(model.model) if name == "get_image_features"]


def test_a_twin_shares_weights_and_nothing_else(small_shapes: dict[str, Shape]) -> None:
    model = small_shapes["A"].build()
    other = twin(model)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(first.data_ptr() == second.data_ptr() for first, second in pairs)
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    assert other.config is not model.config


def test_the_shapes_are_those_of_the_figures() -> None:
    assert [SHAPES[name].visual_tokens for name in "ABV"] == [576, 2928, 6273]
    assert SHAPES["A"].inputs()["input_ids"].shape == (1, 576 + TEXT_TOKENS)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in SHAPES["A"].build("meta").parameters())
        video = sum(parameter.numel() for parameter in SHAPES["V"].build("meta").parameters())
    assert [round(parameters / 1e6), round(video / 1e6)] == [168, 253]


def test_peak_memory_sees_the_largest_sum_of_live_tensors() -> None:
    class Made:
        past_key_values = type("Cache", (), {"layers": []})()

    def generate(**options: object) -> Made:
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        torch.ones(250_000).add_(float(second[0]))
        return Made()

    for _ in range(2):  # what a first run left does not count in a second
        assert peak_memory(generate, "cpu")[0] == pytest.approx(8_000_000, rel=0.01)


def test_a_small_run_of_speed_gives_figures_that_add_up(small_shapes: dict[str, Shape], tmp_path: Path) -> None:
    options = {"part": "speed", "shapes": "A", "rounds": "3", "decode_rounds": "2", "tokens": "4"}
    options["speed_methods"] = "hired,fourier-vlm,tome@0.5+hired"
    bench = get_bench("vision-tokens").from_options(options)
    result = bench.run()
    held = {run: result.figures[f"kv_bytes.A.{run}"].value for run in ("dense", "hired", "hired oracle")}
    assert held["dense"] > held["hired"] == held["hired oracle"] > 0
    for method in ("hired", "fourier-vlm"):
        ratio = result.figures[f"ttft_oracle_ratio.A.{method}"]
        seconds = [result.figures[f"ttft.A.{run}"].value for run in (method, f"{method} oracle")]
        assert ratio.value == pytest.approx(seconds[0] / seconds[1])
        assert ratio.low is not None and ratio.high is not None and 0 < ratio.low <= ratio.value <= ratio.high
        assert result.figures[f"decode_oracle_ratio.A.{method}"].value > 0
        assert result.figures[f"tokens_per_second.A.{method}"].value > 0
        assert result.figures[f"peak_memory.A.{method}"].value > held["hired"]
    both = "tome@0.5+hired"
    assert f"kv_bytes.A.{both} oracle" not in result.figures
    seconds = [result.figures[f"answer.A.{run}"].value for run in ("hired", both)]
    assert result.figures[f"answer_over_hired.A.{both}"].value == pytest.approx(seconds[0] / seconds[1])
    result.save(tmp_path / "speed.json")
    assert BenchResult.load(tmp_path / "speed.json") == result
    with pytest.raises(ValueError, match="this run measured none; set part=quality or part=all"):
        bench.plot(result, tmp_path / "speed.png")


def test_ranking_by_all_rows_has_a_limit_of_its_own(small_shapes: dict[str, Shape]) -> None:
    model, inputs = small_shapes["A"].build(), small_shapes["A"].inputs()
    settings = {"aim": [AIM(merged=0.5, ramp=(0, 2))], "prefix-kv": [PrefixKV()], "hired": [HiRED()]}
    _, rankings = runs_of(model, inputs, settings)
    layers, held = small_shapes["A"].layers, inputs["input_ids"].shape[1]
    assert rankings["prefix-kv"].widths == [held] * layers
    assert rankings["aim"].widths == [held - small_shapes["A"].visual_tokens // 2]
    assert "hired" not in rankings
    options = {"part": "speed", "shapes": "A", "rounds": "2", "decode_rounds": "1", "tokens": "2"}
    figures = get_bench("vision-tokens").from_options({**options, "speed_methods": "prefix-kv@0.5"}).run().figures
    name = "ttft_ranked_ratio.A.prefix-kv@0.5"
    assert 0 < figures[name].value < figures["ttft_oracle_ratio.A.prefix-kv@0.5"].value


def test_quality_over_time_draws_what_was_measured(
    small_shapes: dict[str, Shape], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "load", lambda folder: (_pocket_model(), _processor()))
    options = {"part": "pareto", "questions": 4, "batch": 4, "budgets": "0.5,0.1", "rounds": 1, "shapes": "A"}
    bench = get_bench("vision-tokens").from_options({**options, "methods": "hired,tome@0.5+hired,aim"})
    result = bench.run()
    reached = {"dense", "hired@0.5", "hired@0.1", "tome@0.5+hired@0.5", "tome@0.5+hired@0.1", "aim@0.5"}
    assert reached <= {row["run"] for row in result.rows if row["part"] == "first token"}
    assert {f"ttft.A.{run}" for run in reached} <= set(result.figures)
    bench.plot(result, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 5_000


def test_a_small_run_of_quality_gives_figures_that_add_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, processor = _pocket_model(), _processor()
    pictures = [picture for picture, _ in world.held_out(12)]
    asked = [question for _, question in world.held_out(12)]
    said, kept = Examination.prepare(processor, 12, 5, 96).answers(model)
    own = [dataclasses.replace(question, answer=answer) for question, answer in zip(asked, said, strict=True)]
    own[0] = asked[0]  # so the plain model is right on all but one
    monkeypatch.setattr(bench_quality, "held_out", lambda count, pixels: zip(pictures, own, strict=True))
    monkeypatch.setattr(loading, "load", lambda folder: (model, processor))
    options = {"part": "quality", "questions": 12, "batch": 5, "budgets": "1.0,0.2", "methods": "hired,random,pooled"}
    bench = get_bench("vision-tokens").from_options(options)
    result = bench.run()
    figures = result.figures
    assert kept == figures["visual_tokens.dense"].value == 144
    assert figures["accuracy.dense"].value == pytest.approx(11 / 12)
    for method in ("hired", "random", "pooled"):
        assert figures[f"accuracy.{method}.100"] == figures["accuracy.dense"]
        assert figures[f"accuracy_kept.{method}.100"].value == 1
        assert figures[f"visual_tokens.{method}.100"].value == 144
        assert figures[f"visual_tokens.{method}.20"].value <= 28
    assert figures["accuracy.random.20"].value < figures["accuracy.dense"].value
    gained = figures["accuracy.hired.20"].value - figures["accuracy.random.20"].value
    assert figures["over_random.hired.20"].value == pytest.approx(gained)
    assert figures["over_random.hired.100"].value == 0
    assert sum(row["method"] == "hired" for row in result.rows) == 2
    assert set(result.rows[0]["accuracy_by_kind"]) == set(world.KINDS)
    bench.plot(result, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5_000


def test_a_preset_of_every_method_takes_the_budget_of_the_bench() -> None:
    for name in list_methods():
        if "budget" in get_method(name).json_schema()["properties"] and name not in ("output-gate", "prefix-kv"):
            for preset in get_method(name).presets:
                (method,) = methods_named(f"{name}:{preset}", 0.1)
                assert method.to_dict()["budget"] == 0.1


def test_methods_with_plus_between_act_together_each_with_its_own_budget() -> None:
    methods = methods_named("tome@0.5+hired+prefix-kv@0.4", 0.2)
    assert methods == [ToMe(budget=0.5), HiRED(budget=0.2), PrefixKV(budget=0.4)]
    assert not has_oracle(methods)
    assert has_oracle(methods[1:])
    with pytest.raises(ValueError, match=r"a budget is a number, as in hired@0.5; got 'half'"):
        methods_named("hired@half", 0.2)


def test_budgets_out_of_reach_get_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda folder: (_pocket_model(layers=4), _processor()))
    options = {"part": "quality", "questions": 4, "batch": 4, "budgets": "0.8,0.1"}
    options["methods"] = "pyramid-drop,hired:released-code,tome"
    result = get_bench("vision-tokens").from_options(options).run()
    refused = [row for row in result.rows if row["part"] == "refused"]
    assert [(row["method"], row["budget"]) for row in refused] == [("pyramid-drop", 0.1), ("tome", 0.1)]
    assert "a budget of 0.1 is out of reach" in refused[0]["reason"]
    assert "each of which can merge half of its tokens away" in refused[1]["reason"]
    assert "accuracy.pyramid-drop.10" not in result.figures
    assert {"accuracy.hired:released-code.80", "accuracy.pyramid-drop.80"} <= set(result.figures)


def test_a_small_run_of_selection_counts_what_every_stage_spends(small_shapes: dict[str, Shape]) -> None:
    options = {
        "part": "selection",
        "methods": "hired,visionzip,tome,sparsevlm,prefix-kv,uniform",
        "rounds": "2",
        "budget": "0.4",
    }
    result = get_bench("vision-tokens").from_options(options).run()
    few, many = (small_shapes[name].visual_tokens for name in "AB")
    for method in options["methods"].split(","):
        spent = [result.figures[f"selection.{method}.{tokens}"].value for tokens in (few, many)]
        assert spent[0] > 0
        growth = spent[1] / spent[0] / (many / few)
        assert result.figures[f"selection_growth.{method}"].value == pytest.approx(growth)


def test_wrong_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="there is no shape 'a'; known: A, A7, B, B7, V"):
        get_bench("vision-tokens").from_options({"part": "speed", "shapes": "a"}).run()
    with pytest.raises(ValueError, match="there is no method 'hire'; did you mean 'hired'"):
        get_bench("vision-tokens").from_options({"part": "speed", "speed_methods": "hire"}).run()


def test_runs_that_would_measure_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="so tokens is at least 2; got 1"):
        get_bench("vision-tokens").from_options({"tokens": 1})
    with pytest.raises(ValueError, match="questions, batch and rows are at least 1; got 0, 50 and 1"):
        get_bench("vision-tokens").from_options({"questions": 0})


def _processor() -> Any:
    from mmaccel.pocket.train.llava import make_processor

    return make_processor()


def _pocket_model(layers: int = 2) -> Any:
    """pocket-llava's architecture, with random weights that say something else about every picture."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = _processor().tokenizer
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, initializer_range=0.3,
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=96, patch_size=8,
        initializer_range=0.3,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    )
    return model.eval()
