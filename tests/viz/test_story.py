"""Stories as files: nothing that a model writes becomes markup, and names are safe."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu_embodied.stories import printable
from emu_embodied.viz.story import KINDS, Passage, Story, slug, to_html, to_markdown, write_picture, write_story

MARKUP = st.lists(st.sampled_from(["<b>", "</p>", "<script>", "<img src=x>", "&lt;", "# ", "![a](b)", "\n", "- ", "x"]))
TEXT = st.one_of(st.text(st.characters(exclude_categories=("Cs",)), max_size=40), MARKUP.map("".join))


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.paragraphs: list[str] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open = tag == "p"
        if self._open:
            self.paragraphs.append("")

    def handle_data(self, data):
        if self._open:
            self.paragraphs[-1] += data

    def handle_endtag(self, tag):
        self._open = False


@given(TEXT, st.sampled_from(sorted(KINDS)))
def test_text_stays_text_in_html(text, kind):
    story = Story(task="story", prompt=text, segments=(Passage(text, kind),))
    reader = Reader(to_html(story, Path()))
    shown = bool(text.strip())
    plain = reader.tags.count("p") - 1  # the task's own
    assert plain == shown and set(reader.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "p", "details", "summary",
    }  # fmt: skip
    if shown:
        assert reader.paragraphs[-1].split() == text.split()


@given(TEXT)
def test_text_stays_text_in_markdown(text):
    written = to_markdown(Story(task="story", prompt="P", segments=(Passage(text),)))
    body = written.removeprefix("# P\n")
    assert not re.search(r"(?<!\\)[<\[`*_]", body.replace("\\\\", ""))
    assert not re.search(r"^\s*[#+=-]", body, re.MULTILINE)


def test_a_page_holds_its_pictures(tmp_path):
    picture = write_picture(tmp_path / "image_00.png", np.zeros((4, 6, 3), np.uint8))
    story = Story(task="t2i", prompt="Black", segments=(picture,), notes=("a note",), finished=False)
    assert story.pictures == (picture,) and (picture.width, picture.height) == (6, 4)
    files = write_story(story, tmp_path)
    page = files[1].read_text()
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(data) == (tmp_path / "image_00.png").read_bytes()
    assert "a note" in page and "stopped before the end" in page
    assert "![image_00.png](image_00.png)" in files[0].read_text()


def test_a_prompt_that_is_no_utf8_is_written(tmp_path):
    write_story(Story(task="t2i", prompt="a\udce4b"), tmp_path)
    assert "a?b" in (tmp_path / "story.md").read_text()


@given(TEXT)
def test_names_of_folders_are_short_and_plain(text):
    name = slug(text)
    assert name and len(name.encode()) <= 40 and not set(name) & set('/\\.\0 :*?"<>|_')
    assert slug("untitled") == "untitled" and slug("...") == "untitled"


@pytest.mark.parametrize(
    ("text", "name"),
    [("Öffne die Tür!", "öffne-die-tür"), ("把杯子", "把杯子"), ("../etc/passwd", "etc-passwd"), ("a" * 99, "a" * 40)],
)
def test_names_say_what_was_asked(text, name):
    assert slug(text) == name


@given(st.text())
def test_a_terminal_is_not_the_models_to_control(text):
    assert not set(printable(text)) & {chr(i) for i in (*range(9), *range(11, 32), *range(127, 160))}
    assert printable("line\n\tü👩‍🚀") == "line\n\tü👩‍🚀"
