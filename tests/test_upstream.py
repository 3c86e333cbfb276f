"""Canaries: docs/upstream.md holds what we work around in Diffusers, and each of its blocks asserts what happens today."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "upstream.md"


class Entry(NamedTuple):
    title: str
    text: str
    code: str

    @property
    def workaround(self) -> str:
        return re.search(r"^In diffx: (.*)$", self.text, re.MULTILINE).group(1)


ENTRIES = [Entry(*found) for found in re.findall(r"^## (.*?)\n(.*?)```python\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.title)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Diffusers' code, not of ours
@each_entry
def test_still_happens(entry):
    try:
        exec(compile(entry.code, str(PAGE), "exec"), {})
    except AssertionError:
        pytest.fail(f"fixed upstream: remove the workaround ({entry.workaround}) and the entry {entry.title!r} of docs/upstream.md")


@each_entry
def test_is_short_and_says_what_we_do(entry):
    lines = [line for line in entry.code.splitlines() if line]
    assert len(lines) <= 10 and "assert" in lines[-1]
    assert entry.workaround and re.search(r"^Reports: (#\d+|none found)", entry.text, re.MULTILINE)


def test_a_fixed_bug_fails_with_the_workaround_in_the_message():
    fixed = Entry("sums", "In diffx: we add by hand.\n", "assert 1 + 1 == 3\n")
    with pytest.raises(pytest.fail.Exception, match=r"fixed upstream: remove the workaround \(we add by hand\.\)"):
        test_still_happens(fixed)


def test_the_page_has_an_entry_for_every_heading():
    assert [entry.title for entry in ENTRIES] == re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
