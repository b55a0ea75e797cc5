"""Forms made of methods' schemas: whatever is installed appears, and only plain data goes in."""

import pytest

from demos.forms import OWN, Form, in_words, methods_of, parsed
from mmaccel.methods import get_method, list_methods
from mmaccel.registry import entries

ASK = Form("budget")
SEARCH = Form("nfe", held=("reward", "pictures", "rows_per_call"))


def loads_a_model(name: str) -> bool:
    """Whether the command line can load what the method acts on; it cannot for robots."""
    return get_method(name).stages[0] in entries("mmaccel.loaders")


def test_every_method_of_a_loader_is_offered_and_no_other():
    """`keyframes` has its searches in a tab of its own, and two need another's draft or trail."""
    offered = {name for stage in ("prefill", "denoise", "sample") for name in methods_of(stage)}
    chunks = {name for name in list_methods() if not loads_a_model(name)}
    assert set(list_methods()) - offered == {"continuous-speculation", "keyframes", "replay"} | chunks
    assert "hired" in methods_of("prefill") and "hired" not in methods_of("denoise")


def test_a_new_method_appears_by_itself(monkeypatch):
    from tests.demos.plugin import Centre

    monkeypatch.setattr("demos.forms.list_methods", lambda: ["centre"])
    monkeypatch.setattr("demos.forms.get_method", lambda name: Centre)
    assert methods_of("prefill") == ["centre"]
    assert ASK.text("centre", OWN) == "positions: kept  # kept | packed\nrings: 3  # whole number\n"
    assert ASK.method("centre", OWN, 0.5, "rings: 2") == Centre(budget=0.5, rings=2)


@pytest.mark.parametrize("form, stage", [(ASK, "prefill"), (SEARCH, "denoise")])
def test_what_a_form_shows_first_is_the_method_itself(form, stage):
    for name in methods_of(stage):
        held = {"reward": "brightness"} if form is SEARCH else {}
        knob = 0.5 if form is ASK else 100
        made = form.method(name, OWN, knob, form.text(name, OWN), **held)
        expected = {"budget": 0.5} if form is ASK else {"reward": "brightness", "nfe": 100}
        properties = get_method(name).json_schema()["properties"]
        expected = {key: value for key, value in expected.items() if key in properties}
        assert made == get_method(name).from_dict(expected)


def test_every_preset_says_all_by_itself():
    for name in methods_of("prefill"):
        for preset in ASK.presets(name)[1:]:
            assert ASK.method(name, preset, 0.123, ASK.text(name, preset)) == get_method(name).preset(preset)


@pytest.mark.parametrize(
    "text, message",
    [
        ("alpha: [", "the settings are no YAML"),
        ("- 3", "the settings are lines such as `alpha: 0.5`; got '[3]'"),
        ("a: &x [1]\nb: *x", "without anchors and aliases"),
        ("#" * 5000, "at most 4000 letters; got 5000"),
        ("1: 2", "the settings are lines"),
    ],
)
def test_settings_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError) as refused:
        parsed(text)
    assert message in str(refused.value)


def test_references_and_paths_are_not_set_by_a_browser():
    with pytest.raises(ValueError, match="the setting reward of best-of-n is not set here"):
        SEARCH.method("best-of-n", OWN, 100, "reward: os:system", reward="brightness")
    with pytest.raises(ValueError, match="the setting draft of continuous-speculation is not set here"):
        ASK.method("continuous-speculation", OWN, 0.5, "draft: /etc")
    assert in_words({"type": "string"}) == in_words({"type": "object"}) == ""


def test_an_unknown_setting_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'alpha'"):
        ASK.method("hired", OWN, 0.5, "alhpa: 1")
