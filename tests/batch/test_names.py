"""Outputs stay inside their folder, whatever their names say and whatever stands in the way."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaccel.batch.names import check_name, place
from tests.batch.toys import batch, ledger, outputs, toy, write

EVIL = {
    "a name stays inside the output folder; got the absolute '/": ["/etc/a"],
    'a name stays inside the output folder; got ".." in ': ["..", "../a", "a/../b"],
    "the parts of a name are not empty and begin with no dot or blank; got ": [
        "a//b", "a/", ".hidden", "a/.ssh", " a", "a ",
    ],
    'an output needs a name, e.g. "cats/0001"': [""],
    "a name holds no backslash, colon or unprintable letter; got ": ["a\nb", "a\0b", "C:a", "a\\b"],
    "a part of a name has at most 200 bytes, all 1000; got ": ["x" * 201, "/".join(["x" * 150] * 7), "ä" * 101],
}  # fmt: skip


@pytest.mark.parametrize(("message", "name"), [(message, name) for message, names in EVIL.items() for name in names])
def test_a_name_that_leads_elsewhere_is_refused(message, name):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_name(name)


@given(st.text(alphabet=st.sampled_from("ab./\\ \0:~é-"), max_size=12))
def test_a_name_that_is_accepted_stays_inside(name):
    root = Path("outputs").absolute()
    try:
        check_name(name)
    except ValueError:
        return
    there = Path(os.path.normpath(root / (name + ".png")))
    assert there.is_relative_to(root) and there.parts == (root / (name + ".png")).parts


def test_links_on_the_way_are_refused_and_a_link_in_the_place_is_replaced(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "target.txt").write_text("precious")
    (root / "link").symlink_to(elsewhere)
    (root / "a.txt").symlink_to(elsewhere / "target.txt")
    (tmp_path / "new").write_text("new")
    with pytest.raises(NotADirectoryError, match="nothing is written through links: remove it"):
        place(tmp_path / "new", root, "link/a", ".txt")
    place(tmp_path / "new", root, "a", ".txt")
    assert (root / "a.txt").read_text() == "new" and not (root / "a.txt").is_symlink()
    assert (elsewhere / "target.txt").read_text() == "precious" and len(list(elsewhere.iterdir())) == 1


def test_a_link_in_the_output_folder_fails_the_jobs_behind_it_alone(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write(tmp_path / "jobs.jsonl", [toy(number) for number in range(4)])
    assert batch(path, "--out", out).returncode == 0
    (out / "outputs" / "part-1" / "1.txt").unlink()
    (out / "outputs" / "part-1").rmdir()
    (out / "outputs" / "part-1").symlink_to(elsewhere)
    done = batch(path, "--out", out)
    assert done.returncode == 1 and "nothing is written through links" in done.stderr
    assert [row["status"] for row in ledger(out)] == ["done", "failed", "done", "done"]
    assert not list(elsewhere.iterdir()) and len(outputs(out)) == 3
    for name in ("outputs", ".partial"):
        other = tmp_path / f"linked{name}"
        other.mkdir()
        (other / "ledger.sqlite").touch()
        (other / name).symlink_to(elsewhere)
        assert "is a link; outputs are not written through links" in batch(path, "--out", other).stderr
