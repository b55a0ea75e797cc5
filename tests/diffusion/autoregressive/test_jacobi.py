"""Speculative Jacobi decoding: the official numbers, the joint law, plain decoding token for token, and refusals."""

import pytest
import torch
from scipy import stats
from torch import nn
from transformers import (
    Emu3Config,
    Emu3ForCausalLM,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

import mmaccel
from diffusion.autoregressive import SpeculativeJacobi
from diffusion.autoregressive.jacobi_loop import JacobiDecoding
from diffusion.autoregressive.verification import accepted, drawn, excess, fresh, one_hot, prefix
from mmaccel.checks import check
from mmaccel.cli import app
from mmaccel.methods import Unsupported
from tests.diffusion.autoregressive.tiny import tiny
from tests.vision_tokens.golden import load

WORDS = 12
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def wide(model):
    """With weights that make the laws of words differ from place to place."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return model.eval()


def imagegpt():
    return wide(
        ImageGPTForCausalImageModeling(
            ImageGPTConfig(vocab_size=WORDS + 1, n_positions=40, n_embd=16, n_layer=2, n_head=2, eos_token_id=None)
        )
    )


def llama():
    return wide(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)))


def emu3():
    return wide(Emu3ForCausalLM(Emu3Config(text_config={**SIZES, **HEADS}).text_config))


MODELS = {"imagegpt": imagegpt, "llama": llama, "emu3": emu3}
every_model = pytest.mark.parametrize("family", MODELS)
every_redraw = pytest.mark.parametrize("redraw", ["independent", "coupled", "gumbel"])


def decoded(model, rows=1, tokens=20, seed=0, start=1, **more):
    torch.manual_seed(seed)
    prompt = torch.full((rows, 2), start)
    return model.generate(inputs=prompt, max_new_tokens=tokens, **{"do_sample": True, **more})


@every_model
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}], ids=["plain", "processed"])
def test_with_one_noise_a_position_a_window_decodes_what_single_tokens_decode(family, settings):
    model, found, passes = MODELS[family](), {}, {}
    for window in (1, 7, 32):
        with mmaccel.applied(model, SpeculativeJacobi(window=window, redraw="gumbel")) as run:
            found[window] = decoded(model, rows=3, **settings)
        passes[window] = run.report["passes"]
    assert all(torch.equal(one, found[1]) for one in found.values())
    assert passes[1] == 20 and passes[32] <= 20 and passes[7] < 20
    assert len(found[1][:, 2:].unique(dim=0)) == 3


@every_model
@every_redraw
def test_greedy_decoding_is_plain_greedy_decoding(family, redraw):
    model = MODELS[family]()
    plain = decoded(model, do_sample=False)
    with mmaccel.applied(model, SpeculativeJacobi(redraw=redraw)) as run:
        assert torch.equal(decoded(model, do_sample=False), plain)
    assert run.report["passes"] <= 20


class Table(nn.Module):
    """In the place of a model: the law of a word given the last one, by position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits  # [positions, words, words]

    def __call__(self, input_ids, attention_mask, past_key_values, **more):
        read = attention_mask.shape[1] - input_ids.shape[1]
        places = torch.arange(read, read + input_ids.shape[1])
        return type("Output", (), {"logits": self.logits[places.clamp_max(len(self.logits) - 1), input_ids]})


class Nothing:
    """A cache of nothing."""

    def crop(self, count):
        assert count < 0


class Settings:
    do_sample, num_beams, return_dict_in_generate, eos_token_id = True, 1, False, None

    def __init__(self, max_length):
        self.max_length = max_length


def sequences(table, rows, window, redraw, seed=0, initial="uniform"):
    """Words 1.. of every row, by the decoding loop itself."""
    torch.manual_seed(seed)
    words = torch.zeros(rows, 1, dtype=torch.long)
    method = SpeculativeJacobi(window=window, redraw=redraw, initial=initial)
    loop = JacobiDecoding(method, None, 1.0)
    never = torch.zeros(rows, dtype=torch.bool)
    settings = Settings(len(table))
    found = loop(Table(table), words, LogitsProcessorList(), lambda *_: never, settings, past_key_values=Nothing())
    return found[:, 1:], loop


def joint(table, sequences):
    """The probabilities of sequences that start with word 0."""
    laws = table.softmax(-1)
    chance = torch.ones(len(sequences), dtype=torch.float64)
    before = torch.zeros(len(sequences), dtype=torch.long)
    for place in range(sequences.shape[1]):
        chance *= laws[place, before, sequences[:, place]].double()
        before = sequences[:, place]
    return chance


def chi_square(counts, chances):
    """The p-value of counts against chances, rare outcomes together."""
    expected = counts.sum() * chances
    common = expected >= 5
    counts, expected = (torch.cat([one[common], one[~common].sum()[None]]) for one in (counts.double(), expected))
    kept = expected > 0
    return stats.chisquare(counts[kept], expected[kept] * counts[kept].sum() / expected[kept].sum()).pvalue


def counted(rows, calls, redraw, initial="uniform"):
    """How often each of the 81 sequences of four words came out of calls with so many rows, and its probability."""
    table = load("sjd/joint")[0]["table_logits"][1:5]
    table = torch.cat([table, table[-1:]])
    found = torch.cat([sequences(table, rows, 3, redraw, seed, initial)[0] for seed in range(calls)])
    counts = torch.bincount((found * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    return counts, joint(table, torch.cartesian_prod(*[torch.arange(3)] * 4))


@pytest.mark.parametrize(("redraw", "initial"), [
    ("independent", "uniform"), ("coupled", "uniform"), ("gumbel", "uniform"), ("coupled", "repeat-left"),
    ("independent", "sample-left"),
])  # fmt: skip
def test_sequences_have_the_models_joint_law(redraw, initial):
    """Rows of a batch get ahead of each other, and are exact."""
    assert chi_square(*counted(8, 200, redraw, initial)) > 1e-3


def test_the_test_of_the_joint_law_sees_drafts_that_are_kept_too_often(monkeypatch):
    monkeypatch.setattr("diffusion.autoregressive.jacobi_loop.accepted", lambda x, p, q, u: accepted(x, p, q, u**3))
    assert chi_square(*counted(8, 200, "independent")) < 1e-6


@pytest.mark.slow
@every_redraw
@pytest.mark.parametrize(("rows", "calls"), [(1, 1500), (8, 1000)])
def test_sequences_still_have_it_in_many_draws(rows, calls, redraw):
    assert chi_square(*counted(rows, calls, redraw)) > 1e-3


def test_the_official_joint_law_is_ours():
    golden, _ = load("sjd/joint")
    laws, chance = golden["table_logits"].softmax(-1), torch.ones(81, dtype=torch.float64)
    before = torch.zeros(81, dtype=torch.long)
    for place in range(4):
        chance *= laws[place, before, golden["sequences"][:, place]].double()
        before = golden["sequences"][:, place]
    offset = torch.allclose(chance, golden["exact_joint"], atol=1e-6)
    assert offset or torch.allclose(
        joint(golden["table_logits"], golden["sequences"]), golden["exact_joint"], atol=1e-6
    )


CASES = sorted({key.rpartition(".")[0] for key in load("sjd/verify")[0]})


@pytest.mark.parametrize("case", CASES)
def test_verification_is_the_official_one(case):
    """Draft i pairs with the target's row i - 1; the release commits whole rows of the window."""
    golden, _ = load("sjd/verify")
    given = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    drafts, q, p = given["draft_tokens"][:, 1:], given["draft_prob"][:, 1:], given["advanced_prob"][:, :-1]
    kept = prefix(accepted(drafts, p, q, given["u"][:, 1:]))
    assert torch.equal(kept + 1, given["first_misaligned"])
    for row, many in enumerate(kept.tolist()):
        assert torch.equal(given["out_tokens"][row, :many], drafts[row, :many])
        if many < drafts.shape[1]:
            left = excess(p[row, many], q[row, many])
            assert torch.allclose(left, given["residual"][row], atol=1e-5)
            assert left[given["out_tokens"][row, many]] > 0
            assert torch.equal(given["out_tokens"][row, many + 1 :], given["advanced_tokens"][row, many + 1 :])
    same = prefix(given["advanced_tokens"][:, :-1] == drafts)
    assert int(same.min()) + 1 == int(given["greedy_matched_num"])


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_a_whole_decode_is_the_official_one(case):
    """Window by window, with the draws of the release."""
    golden, _ = load("sjd/trace")
    given = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    passes, _, _ = given["nfe_window"].tolist()
    tokens: list[int] = []
    for number in range(passes):
        step = {key.split(".")[1]: value for key, value in given.items() if key.startswith(f"it{number:02d}.")}
        drafts, q, p = step["window"][:, 1:], step["draft_prob"][:, 1:], step["target_prob"][:, :-1]
        kept = int(prefix(accepted(drafts, p, q, step["u"][:, 1:]))[0])
        assert kept + 1 == int(step["matched"])
        assert torch.equal(step["matched_tokens"][:, :kept], drafts[:, :kept])
        if kept < drafts.shape[1]:
            assert excess(p[0, kept], q[0, kept])[step["matched_tokens"][0, kept]] > 0
        else:
            assert torch.equal(step["matched_tokens"][:, -1], step["sampled"][:, -1])
        tokens += step["matched_tokens"][0].tolist()
    assert given["tokens"][0].tolist()[-len(tokens) :] == tokens


INITIALS = {"random": "uniform", "repeat_horizon": "repeat-left", "sample_horizon": "sample-left"}


@pytest.mark.parametrize("case", ["case0", "case1", "case2", "case3"])
@pytest.mark.parametrize("kind", INITIALS)
def test_fresh_drafts_are_the_official_ones(case, kind):
    golden, _ = load("sjd/init")
    given = {key.split(".")[-1]: value for key, value in golden.items() if key.startswith(f"{case}.{kind}.")}
    there, added, _, width, prompt = given["meta_nin_nadd_nrand_width_prefill"].tolist()
    last = given["additional_tokens" if added else "input_ids"][:, -1]
    if kind == "sample_horizon":
        last = given["additional_scores" if added else "scores"][:, -1].argmax(-1)
    column = there + added - prompt - 3  # three words head an image, and a line ends with a word of its own
    made = fresh(INITIALS[kind], given["random_base"], last, column, width + 1)
    assert torch.equal(made, given["out_tokens"])
    assert torch.equal(one_hot(made, 60), given["out_onehot"].float())


def test_an_excess_that_rounding_left_nothing_of_is_the_law_itself():
    law = torch.tensor([[0.2, 0.8]])
    assert torch.equal(excess(law, law), law)
    assert torch.allclose(excess(law, torch.tensor([[0.5, 0.5]])), torch.tensor([[0.0, 1.0]]))
    assert drawn(torch.zeros(2, 0, 5)).shape == (2, 0)


@every_redraw
def test_the_report_counts_passes_and_the_model_comes_back(redraw):
    model, calls = imagegpt(), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    plain = decoded(model)
    del calls[:]
    with mmaccel.applied(model, SpeculativeJacobi(window=8, redraw=redraw)) as run:
        first, second = decoded(model), decoded(model)
    assert torch.equal(first, second) and first.shape == plain.shape
    assert run.report["passes"] == len(calls) / 2 and run.report.to_dict()["passes_dense"] == 20
    commits = run.report.to_dict()["commits"]
    assert sum(number * times for number, times in commits.items()) == 20
    assert run.report["tokens_a_pass"] == 20 / run.report["passes"] and run.report["speed_up"] > 0
    handle.remove()
    assert torch.equal(decoded(model), plain) and "generate" not in vars(model)


def test_guidance_goes_through_the_model_in_one_pass_and_means_what_it_means_to_transformers():
    model = llama()
    negative = torch.full((1, 2), 3)
    guided = {"guidance_scale": 2.5, "negative_prompt_ids": negative, "do_sample": False}
    plain, unguided = decoded(model, **guided), decoded(model, do_sample=False)
    assert not torch.equal(plain, unguided)
    with mmaccel.applied(model, SpeculativeJacobi()) as run:
        assert torch.equal(decoded(model, **guided), plain)
        assert run.report["passes"] <= 20
        found = {}
        for window in (1, 9):
            mmaccel.apply(model, SpeculativeJacobi(window=window, redraw="gumbel"))
            found[window] = decoded(model, **{**guided, "do_sample": True})
        assert torch.equal(found[1], found[9])


def test_processors_that_read_no_tokens_act_on_a_window_as_on_single_tokens(monkeypatch):
    """All of them in one call; and with one that reads tokens beside them, position by position."""
    model, settings = llama(), {"top_k": 5, "temperature": 0.7, "top_p": 0.9, "suppress_tokens": [3]}
    with mmaccel.applied(model, SpeculativeJacobi(window=6)):
        together = decoded(model, rows=2, **settings)
        monkeypatch.setattr("diffusion.autoregressive.decoding.BLIND", ())
        assert torch.equal(decoded(model, rows=2, **settings), together)
        assert 3 not in together[:, 2:]
        monkeypatch.undo()
        mmaccel.apply(model, SpeculativeJacobi(window=6, redraw="gumbel"))
        found = decoded(model, repetition_penalty=3.0, **settings)
        mmaccel.apply(model, SpeculativeJacobi(window=1, redraw="gumbel"))
        assert torch.equal(decoded(model, repetition_penalty=3.0, **settings), found)


def test_a_padded_batch_decodes_what_its_rows_decode():
    model = llama()
    prompts = torch.tensor([[0, 0, 5, 7], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with mmaccel.applied(model, SpeculativeJacobi(window=6)):
        batch = model.generate(inputs=prompts, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for row in range(2):
            alone = model.generate(
                inputs=prompts[row : row + 1, mask[row].argmax() :], max_new_tokens=12, do_sample=False
            )
            assert torch.equal(alone[0, -12:], batch[row, -12:])


def test_the_end_of_an_image_ends_it():
    model = llama()
    plain = decoded(model, do_sample=False)[0, 2:].tolist()
    end = plain[6]
    with mmaccel.applied(model, SpeculativeJacobi()):
        found = decoded(model, do_sample=False, eos_token_id=end)[0, 2:].tolist()
        assert found == plain[: plain.index(end) + 1]
        with pytest.raises(Unsupported, match="rows of a batch that may end at different places; draw them one by one"):
            decoded(model, rows=2, eos_token_id=end)


@every_model
def test_check_finds_every_law_kept(family):
    inputs = {"inputs": torch.tensor([[1, 2]]), "max_new_tokens": 9, "do_sample": True}
    report = check(MODELS[family](), SpeculativeJacobi(window=5), inputs=inputs)
    assert report.passed, str(report)
    assert len(report.laws) == 5


REFUSED = [
    ({"num_beams": 2}, "speculative-jacobi draws samples; got num_beams=2. Pass num_beams=1"),
    ({"return_dict_in_generate": True}, "returns tokens alone; pass return_dict_in_generate=False"),
    ({"cache_implementation": "static"}, "takes tokens back out of the cache; got StaticCache. Use a dynamic cache"),
    ({"guidance_scale": 2.0}, "guidance_scale needs negative_prompt_ids here"),
    (
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.ones(1, 5, dtype=torch.long)},
        r"negative_prompt_ids have the prompt's shape here, \[1, 2\]; got \[1, 5\]",
    ),
    ({"custom_generate": print}, "a way of decoding of its own; leave custom_generate and assistant_model away"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_calls_that_it_would_decode_otherwise_are_refused(call, message):
    model = llama()
    with mmaccel.applied(model, SpeculativeJacobi()), pytest.raises(Unsupported, match=message):
        decoded(model, **call)


def test_models_that_it_cannot_serve_are_refused():
    with pytest.raises(Unsupported, match=r"got MARModel\. For autoregressive models of continuous tokens take Contin"):
        mmaccel.apply(tiny(), SpeculativeJacobi())
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(Unsupported, match="needs a decoder alone; T5ForConditionalGeneration has an encoder"):
        mmaccel.apply(t5, SpeculativeJacobi())
    for kind, reason in (("janus", "in a loop of its own"), ("chameleon", "forbids image tokens in its forward")):
        other = llama()
        other.config.model_type = kind
        with pytest.raises(Unsupported, match=rf"LlamaForCausalLM: .*{reason}"):
            mmaccel.apply(other, SpeculativeJacobi())
    sliding = MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=4)).eval()
    with mmaccel.applied(sliding, SpeculativeJacobi()), pytest.raises(Unsupported, match="have sliding windows"):
        decoded(sliding)
    for settings, message in (
        ({"group": 0}, "group is a number of words from 1 up; got 0. 1 is lossless"),
        ({"group": 3, "redraw": "gumbel"}, "equals plain decoding, and group=3, slack=0.0 keep what it would not draw"),
        ({"window": 0}, "window is a number of tokens from 1 up; got 0. 1 is plain decoding"),
        ({"row_length": 0}, "row_length is a number of tokens from 1 up; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculativeJacobi(**settings)


def test_the_command_checks_a_folder(tmp_path):
    imagegpt().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path), "speculative-jacobi", "--set", "window=5"])
    assert result.exit_code == 0 and "passed" in result.stdout, result.stderr
