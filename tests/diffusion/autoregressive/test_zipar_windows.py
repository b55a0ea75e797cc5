"""ZipAR's adaptive windows: a test leaves first tokens with the wider window's law; and what ZipAR refuses."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

import mmaccel
from diffusion.autoregressive import ZipAR
from diffusion.autoregressive.verification import accepted
from diffusion.autoregressive.zipar_loop import Front, ZipDecoding
from mmaccel.cli import app
from mmaccel.methods import Unsupported
from tests.diffusion.autoregressive.test_jacobi import HEADS, SIZES, WORDS, chi_square, llama
from tests.diffusion.autoregressive.test_zipar import painted, zipar
from tests.diffusion.autoregressive.tiny import tiny

IMAGES = 20_000


def opened(laws, columns=9, window=2):
    """The first tokens of many second rows, after one law a pass; the decoding, and whether each pass redrew."""
    torch.manual_seed(0)
    decoding = ZipDecoding(ZipAR(window=window), None, 1.0)
    decoding.columns, decoding.front = columns, Front(2, columns)
    decoding.grid = torch.zeros(IMAGES, 2 * columns, dtype=torch.long)
    decoding.windows, decoding.missing, decoding.before = [], 0, 0
    redrawn = []
    for number, law in enumerate(laws):
        decoding.front.drawn[0] = window + number
        p = law.expand(IMAGES, -1)
        redrawn.append(decoding._redrawn(1, p, torch.multinomial(p, 1)[:, 0], window + number))
    return decoding.grid[:, columns], decoding, redrawn


def two_laws():
    return torch.randn(2, WORDS, generator=torch.Generator().manual_seed(4)).mul(1.5).softmax(-1)


def test_a_test_leaves_first_tokens_with_the_law_of_the_wider_window():
    narrow, wide = two_laws()
    before, _, _ = opened([narrow])
    after, decoding, redrawn = opened([narrow, wide])
    count = [torch.bincount(tokens, minlength=WORDS) for tokens in (before, after)]
    assert chi_square(count[0], narrow.double()) > 1e-3 and chi_square(count[1], wide.double()) > 1e-3
    assert chi_square(count[1], narrow.double()) < 1e-6
    share = float((before == after).double().mean())
    assert share == pytest.approx(float(torch.minimum(narrow, wide).sum()), abs=0.01)  # as many as can be are kept
    assert redrawn == [False, True] and decoding.front.tentative
    assert torch.equal(decoding.open, before != after) and decoding.windows == []


def test_the_test_of_the_law_sees_tokens_that_are_kept_too_often(monkeypatch):
    monkeypatch.setattr("diffusion.autoregressive.zipar_loop.accepted", lambda x, p, q, u: accepted(x, p, q, u**3))
    after, _, _ = opened(two_laws())
    assert chi_square(torch.bincount(after, minlength=WORDS), two_laws()[1].double()) < 1e-6


def test_where_the_wider_window_changes_nothing_every_token_is_kept_at_once():
    narrow, _ = two_laws()
    after, decoding, redrawn = opened([narrow, narrow])
    assert redrawn == [False, False] and not decoding.front.tentative and decoding.windows == [2]
    assert chi_square(torch.bincount(after, minlength=WORDS), narrow.double()) > 1e-3


def test_the_whole_row_above_is_the_last_word():
    narrow, wide = two_laws()
    after, decoding, redrawn = opened([narrow, wide], columns=3)
    assert redrawn == [False, True] and not decoding.front.tentative and decoding.windows == [3]
    assert chi_square(torch.bincount(after, minlength=WORDS), wide.double()) > 1e-3


def test_adaptive_windows_miss_less_and_take_longer():
    model, found = llama(), {}
    for adaptive in (False, True):
        with mmaccel.applied(model, zipar(2, adaptive=adaptive)) as run:
            painted(model)
        found[adaptive] = run.report["missing"], -run.report["passes"]
    assert found[True] < found[False] and found[True][1] < found[False][1]


REFUSED = [
    ({"max_new_tokens": 18}, {}, "18 new tokens are no whole rows of 5; set max_new_tokens to a multiple of that"),
    (
        {},
        {"row_length": None},
        "needs the length of a picture's rows: 20 new tokens are no square. Set row_length, and",
    ),
    ({"num_beams": 2}, {}, "zipar draws samples; got num_beams=2. Pass num_beams=1"),
    ({"cache_implementation": "static"}, {}, "tokens back out of the cache; got StaticCache. Use a dynamic cache"),
    ({"use_cache": False}, {}, "zipar takes tokens back out of the cache; got NoneType. Use a dynamic cache"),
    ({"return_dict_in_generate": True}, {}, "returns tokens alone; pass return_dict_in_generate=False"),
    ({"eos_token_id": 3}, {}, "at no word or time; got eos_token_id=3.*generation_config.eos_token_id = None"),
    ({"max_time": 9.0}, {}, "got eos_token_id=None, MaxTimeCriteria.* and pass no other criteria"),
    ({"guidance_scale": 2.0}, {}, "guidance_scale needs negative_prompt_ids here"),
    ({"assistant_model": "any"}, {}, "zipar is a way of decoding of its own; leave custom_generate and assistant_mod"),
]


@pytest.mark.parametrize(("call", "settings", "message"), REFUSED)
def test_calls_that_it_would_decode_otherwise_are_refused(call, settings, message):
    model = llama()
    with mmaccel.applied(model, zipar(**settings)), pytest.raises(Unsupported, match=message):
        painted(model, **call)


def test_a_temperature_of_zero_is_refused_and_greedy_decoding_is_not():
    model = llama()
    with mmaccel.applied(model, zipar(2)):
        with pytest.raises(ValueError, match=r"`temperature` .*has to be a strictly positive float.*`do_sample=False`"):
            painted(model, temperature=0.0)
        assert torch.equal(painted(model, do_sample=False), painted(model, seed=1, do_sample=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window is a number of tokens from 1 up; got 0. A row's length is plain decoding"),
        ({"row_length": 0}, "row_length is a number of tokens from 1 up; got 0"),
        ({"end_of_row": -1}, "end_of_row is a word of the model, from 0 up, or None; got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ZipAR(**settings)


class Deaf(LlamaForCausalLM):
    """A class that does not listen to positions."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class Blind(LlamaForCausalLM):
    """A class that hides nothing but what comes later."""

    def forward(self, *args, position_ids=None, attention_mask=None, **kwargs):
        return super().forward(*args, position_ids=position_ids, **kwargs)


def test_models_that_it_cannot_serve_are_refused():
    with pytest.raises(Unsupported, match=r"got MARModel\. For autoregressive models of continuous tokens take Contin"):
        mmaccel.apply(tiny(), ZipAR())
    for kind, reason in (("janus", "in a loop of its own"), ("chameleon", "forbids image tokens in its forward")):
        other = llama()
        other.config.model_type = kind
        with pytest.raises(Unsupported, match=rf"LlamaForCausalLM: .*{reason}"):
            mmaccel.apply(other, ZipAR())
    bloom = BloomForCausalLM(BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(Unsupported, match="zipar reads tokens out of order; BloomForCausalLM takes no position_ids"):
        mmaccel.apply(bloom, ZipAR())
    for kind in (Deaf, Blind):
        other = llama()
        other.__class__ = kind
        with pytest.raises(Unsupported, match=rf"{kind.__name__} gives other logits then: \d\.\de-?\d+ of the largest"):
            mmaccel.apply(other, ZipAR())
    other = llama()
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(Unsupported, match=r"which 'flex_attention' attention cannot; call model.set_attn_implement"):
        mmaccel.apply(other, ZipAR())
    sliding = MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=4)).eval()
    with mmaccel.applied(sliding, zipar()), pytest.raises(Unsupported, match="have sliding windows"):
        painted(sliding)
    with pytest.raises(Unsupported, match="end_of_row=12 is no word of this model, whose words are 0 to 11"):
        mmaccel.apply(llama(), ZipAR(end_of_row=12))


def test_the_command_checks_a_folder(tmp_path):
    llama().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["check", str(tmp_path), "zipar", "--set", "window=2"])
    assert result.exit_code == 0 and "passed" in result.stdout, result.stderr
