"""Methods come and go, on several models and in several threads, and every model comes back as it was."""

import copy
import itertools
import pickle
import threading

import pytest
import torch

import mmaccel
from tests.vision_tokens.tiny import TEXT, Prompts, build, inputs_for
from tests.vision_tokens.usage import own, prompt_of
from vision_tokens import FourierVLM, HiRED
from vision_tokens.laws import fingerprint, generated, largest_difference

METHOD = HiRED(budget=0.25)
ONE = Prompts()


def test_copies_pickles_and_saved_folders_are_plain(tmp_path):
    model, inputs = build.__wrapped__("llava"), prompt_of()  # transformers' own hooks after a call cannot be pickled
    mmaccel.apply(model, METHOD)
    thawed, twin = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).eval()
    _, decorated = generated(model, inputs, 3)
    _, dense = generated(mmaccel.remove(model), inputs, 3)
    assert not torch.equal(decorated, dense)
    for plain in (twin, thawed, saved):
        with pytest.raises(ValueError, match="no method is applied"):
            mmaccel.report(plain)
        assert all(map(torch.equal, plain.parameters(), model.parameters()))
        assert largest_difference(generated(plain, inputs, 3)[1], dense) < 1e-6


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_applying_again_replaces(llava, budget):
    inputs = prompt_of()
    mmaccel.apply(llava, HiRED(budget=0.9))
    mmaccel.apply(llava, HiRED(budget=budget))
    generated(llava, inputs, 1)
    assert mmaccel.report(llava)["visual_tokens"] == int(36 * budget)
    mmaccel.remove(llava)


def test_two_methods_that_fight_are_refused_and_the_first_stays(llava):
    mmaccel.apply(llava, HiRED())
    with pytest.raises(ValueError, match=r"hired and fourier-vlm both act on the stage 'prefill'.*mmaccel.remove"):
        mmaccel.apply(llava, FourierVLM())
    generated(llava, prompt_of(), 1)
    assert mmaccel.report(llava).methods[0]["method"] == "hired"


def test_removing_after_somebody_else_patched_on_top_names_them(llava):
    before = fingerprint(llava)
    mmaccel.apply(llava, METHOD)
    ours = llava.model.get_image_features

    def patched_by_somebody(*args, **kwargs):
        return ours(*args, **kwargs)

    llava.model.get_image_features = patched_by_somebody
    with pytest.raises(RuntimeError, match=r"LlavaModel.get_image_features.*patched_by_somebody"):
        mmaccel.remove(llava)
    llava.model.get_image_features = ours
    mmaccel.remove(llava)
    assert fingerprint(llava) == before


def test_blocks_in_blocks_give_back_what_stood_before_each():
    model, inputs = build("llava"), inputs_for("llava", ONE, build("llava"))
    generated(model, inputs, 1)
    before = fingerprint(model)

    def kept():
        generated(model, inputs, 1)
        return mmaccel.report(model)["visual_tokens"]

    with mmaccel.applied(model, HiRED(budget=0.75)):
        with mmaccel.applied(model, HiRED(budget=0.5)):
            assert kept() == 18
            with pytest.raises(ValueError, match="hired and fourier-vlm both act on the stage"):
                mmaccel.apply(model, FourierVLM())
            assert kept() == 18
            mmaccel.remove(model)
            with pytest.raises(ValueError, match="no method is applied to this LlavaForConditionalGeneration"):
                mmaccel.remove(model)
        assert kept() == 27
        mmaccel.apply(model, HiRED(budget=0.25))
        assert kept() == 9
    assert fingerprint(model) == before


def test_a_block_that_raises_gives_the_model_back():
    model = build("llava")
    before = fingerprint(model)
    with pytest.raises(KeyError, match="ours"), mmaccel.applied(model, METHOD):
        raise KeyError("ours")
    assert fingerprint(model) == before


def test_a_copy_made_inside_a_block_outlives_it_as_a_plain_model():
    model, inputs = own(), inputs_for("llava", ONE, build("llava"))
    dense = generated(model, inputs, 2)[1]
    with mmaccel.applied(model, METHOD):
        twin = copy.deepcopy(model)
        with mmaccel.applied(twin, FourierVLM()):
            generated(twin, inputs, 2)
        assert torch.equal(generated(twin, inputs, 2)[1], dense)
    assert TEXT["num_hidden_layers"] == len(twin.model.language_model.layers)


# Several models, several threads


def test_two_models_that_share_a_configuration_do_not_meet():
    from transformers import LlavaForConditionalGeneration

    first = own()
    second = LlavaForConditionalGeneration(first.config).eval()
    assert first.model.vision_tower.config is second.model.vision_tower.config
    inputs = inputs_for("llava", ONE, first)
    dense = [generated(model, inputs, 2)[1] for model in (first, second)]
    before = [fingerprint(model) for model in (first, second)]
    mmaccel.apply(first, METHOD)
    assert torch.equal(generated(second, inputs, 2)[1], dense[1])
    mmaccel.apply(second, HiRED(budget=0.5))
    both = [generated(model, inputs, 2)[1] for model in (first, second)]
    mmaccel.remove(first)
    assert torch.equal(generated(first, inputs, 2)[1], dense[0])
    assert torch.equal(generated(second, inputs, 2)[1], both[1])
    assert mmaccel.report(second)["visual_tokens"] == 18
    mmaccel.remove(second)
    assert [fingerprint(model) for model in (first, second)] == before


def test_applying_in_one_thread_leaves_another_thread_s_model_alone():
    first, second = own(), own()
    inputs = inputs_for("llava", ONE, first)
    generated(first, inputs, 2)
    before, stop, failed = fingerprint(first), threading.Event(), []

    def come_and_go():
        for method in itertools.cycle([METHOD, FourierVLM(), HiRED(budget=0.5)]):
            if stop.is_set():
                return
            try:
                with mmaccel.applied(first, method) as run:
                    generated(first, inputs, 1)
                    run.report.to_dict()
            except Exception as error:
                failed.append(error)
                return

    with mmaccel.applied(second, METHOD):
        alone = generated(second, inputs, 4)[1]
        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for _ in range(10):
                assert torch.equal(generated(second, inputs, 4)[1], alone)
        finally:
            stop.set()
            thread.join()
    assert not failed and fingerprint(first) == before


def test_a_report_can_be_read_while_another_thread_generates():
    """Counting FLOPs once ran the living model on tensors without values."""
    model, inputs = build("llava"), inputs_for("llava", ONE, build("llava"))
    with mmaccel.applied(model, METHOD) as run:
        alone = generated(model, inputs, 4)[1]
        figures = run.report.to_dict()
        stop = threading.Event()

        def read():
            while not stop.is_set():
                generated(model, inputs, 1)
                assert run.report["prefill_flops"] == figures["prefill_flops"]

        thread = threading.Thread(target=read)
        thread.start()
        try:
            for _ in range(10):
                assert torch.equal(generated(model, inputs, 4)[1], alone)
        finally:
            stop.set()
            thread.join()
