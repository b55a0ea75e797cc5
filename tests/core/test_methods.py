"""Methods as plain data: dictionaries, recipes, the registry."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import mmaccel
from mmaccel.methods import STAGES, get_method, list_methods, method_from_dict
from mmaccel.recipes import load_recipe, recipe_from_data, save_recipe
from tests.core.required import required
from vision_tokens import FourierVLM, HiRED, RandomTokens

budgets = st.one_of(st.floats(0.001, 1.0), st.integers(2, 5000), st.builds(mmaccel.Tokens, st.integers(1, 5000)))
methods = st.one_of(
    st.builds(HiRED, budget=budgets, alpha=st.floats(0, 1), split=st.sampled_from(["rectangles", "strips"])),
    st.builds(FourierVLM, budget=budgets, gain=st.sampled_from(["paper", "mean-preserving"])),
    st.builds(RandomTokens, budget=budgets, seed=st.integers(0, 2**32 - 1)),
)


@given(methods)
def test_a_method_survives_its_dictionary_and_json_and_yaml(method):
    data = method.to_dict()
    assert type(method).from_dict(data) == method
    assert method_from_dict(json.loads(json.dumps(data))) == method
    assert method_from_dict(yaml.safe_load(yaml.safe_dump(data))) == method


@pytest.mark.parametrize("name", list_methods())
def test_every_registered_method_says_what_it_is(name):
    cls = get_method(name)
    assert cls.name == name and cls.summary().endswith(".") and set(cls.stages) <= set(STAGES)
    method = cls.from_dict({"method": name, **required(cls)})
    assert method.to_dict().items() >= required(cls).items() and cls.from_dict(method.to_dict()) == method
    schema = cls.json_schema()
    assert schema["additionalProperties"] is False
    assert {"budget", "reward", "draft", "window", "least", "static"} & set(schema["properties"])


def test_the_dictionary_is_the_documented_one():
    assert HiRED(budget=0.2).to_dict() == {
        "method": "hired", "version": 1, "budget": 0.2, "positions": "kept", "alpha": 0.5, "split": "rectangles",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "hird"}, r"there is no method 'hird'; did you mean 'hired'\? known: .*fourier-vlm, hired"),
        ({"budget": 0.2}, r'a method is a mapping with a key "method"'),
        ({"method": "hired", "buget": 0.2}, r"hired has no setting 'buget'; did you mean 'budget'\?"),
        ({"method": "hired", "version": 7}, r"hired is at version 1; the data says version 7"),
        ({"method": "hired", "alpha": "much"}, r"hired: alpha: .*got 'much'"),
        ({"method": "hired", "split": "stripes"}, r"hired: split: .*'rectangles' or 'strips'.*got 'stripes'"),
        ({"method": "hired", "budget": 0}, r"whole number from 2 up; got 0"),
        ({"method": "hired", "budget": 1}, r"^hired: the budget 1 could mean one token or everything.*everything$"),
        ({"method": "hired", "budget": 1.01}, r"lies in \(0, 1\]; got 1.01"),
    ],
)
def test_wrong_data_is_refused_with_the_nearest_that_works(data, message):
    with pytest.raises(ValueError, match=message):
        method_from_dict(data)


def test_data_for_another_method_is_refused():
    with pytest.raises(ValueError, match="this is method 'hired', but the data is for 'random'"):
        HiRED.from_dict({"method": "random"})


def test_an_integer_written_as_a_whole_float_keeps_its_meaning():
    assert method_from_dict(json.loads('{"method": "hired", "budget": 1.0}')).budget == 1.0
    assert isinstance(method_from_dict(json.loads('{"method": "hired", "budget": 64}')).budget, int)


@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
def test_a_recipe_file_gives_back_its_methods(tmp_path, ending):
    recipe = [HiRED(budget=0.3, split="strips")]
    path = tmp_path / f"recipe.{ending}"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_settings_override_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("- method: hired\n  alpha: 0.3\n")
    assert load_recipe(path, ["budget=0.4"]) == [HiRED(budget=0.4, alpha=0.3)]
    assert load_recipe(path, ["hired.budget=64"]) == [HiRED(budget=64, alpha=0.3)]
    with pytest.raises(ValueError, match=r"no method of the recipe has a setting 'bugdet'; settings: alpha, budget"):
        load_recipe(path, ["bugdet=0.4"])
    with pytest.raises(ValueError, match=r"a setting is written name=value.*got 'budget'"):
        load_recipe(path, ["budget"])
    with pytest.raises(ValueError, match=r"no method of the recipe has a setting 'random.budget'"):
        load_recipe(path, ["random.budget=0.4"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("recipe.json", "{", "recipe.json: not readable as JSON"),
        ("recipe.yaml", "a: [", "recipe.yaml: not readable as YAML"),
        ("recipe.yaml", "3", r"recipe.yaml: a recipe is a list of methods"),
        ("recipe.yaml", "[]", r"recipe.yaml: a recipe is a list of methods"),
        ("recipe.toml", "", r"a recipe is a .json, .yaml or .yml file; got 'recipe.toml'"),
        ("recipe.yaml", "- method: hired\n  buget: 1", "recipe.yaml: hired has no setting 'buget'"),
    ],
)
def test_a_recipe_that_cannot_be_read_says_where_and_why(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / name)


def test_a_missing_recipe_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "none.yaml")


def test_one_mapping_is_a_recipe_of_one():
    assert recipe_from_data({"method": "random"}) == [RandomTokens()]


@pytest.mark.parametrize("name", list_methods())
def test_every_preset_builds_its_method(name):
    cls = get_method(name)
    for preset, settings in cls.presets.items():
        built = cls.preset(preset, **required(cls))
        assert built == cls.from_dict({**required(cls), **settings})
        assert built == cls.from_dict({"method": name, "preset": preset, **required(cls)})


def test_settings_beside_a_preset_change_it_and_an_unknown_one_names_the_nearest():
    from vision_tokens import HiRED

    assert HiRED.preset("llava-next-40", alpha=0.3) == HiRED(budget=0.4, alpha=0.3)
    with pytest.raises(ValueError, match=r"hired has no preset 'llava-next-41'; did you mean 'llava-next-40'"):
        HiRED.preset("llava-next-41")
