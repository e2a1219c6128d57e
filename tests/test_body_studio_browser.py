"""The Body tab of the studio in JupyterLab, moved by a real browser.

Needs Chromium and the Python package playwright. Where they are missing the tests are skipped, except where CI is
set: there they fail. Screenshots go to artifacts/screenshots."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from jupyter import SHOTS, browser, check_layout, open_notebook, serve_lab, show_in, write_notebook  # noqa: E402, F401

STUDIO = """
from carproto.app.body_studio import open_body_studio
studio = open_body_studio("toy64", n_cars=4, n_frames=9, folder={folder!r})
studio.equal.value = False
studio
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a notebook that shows the studio."""
    folder = tmp_path_factory.mktemp("body")
    write_notebook(folder / "body.ipynb", STUDIO.format(folder=str(folder)))
    return folder


@pytest.fixture(scope="module")
def page(browser, folder, tmp_path_factory):  # noqa: F811
    """The notebook, opened and run."""
    with serve_lab(folder, tmp_path_factory.mktemp("jupyter")) as url:
        page = open_notebook(browser, f"{url}/lab/tree/body.ipynb?reset", ".carproto-body .noUi-handle")
        wait_for_rest(page)
        yield page


HANDLE = ".carproto-body .noUi-handle >> nth=0"


def wait_for_rest(page) -> None:
    """Wait until the panel has generated and measured everything."""
    page.wait_for_function("document.querySelector('img.carproto-picture')?.naturalWidth > 0")
    page.wait_for_timeout(600)  # the bar appears a moment after the first frame
    page.wait_for_function("document.querySelector('.carproto-bar').style.visibility === 'hidden'")


def picture(page) -> str:
    """Return the address of the picture on view, another one for each frame."""
    return page.evaluate("document.querySelector('img.carproto-picture').src")


def press(page, keys: str, handle: str) -> None:
    """Press a key on a slider and wait for another picture."""
    before = picture(page)
    page.locator(handle).focus()
    page.keyboard.press(keys)
    page.wait_for_function("before => document.querySelector('img.carproto-picture').src !== before", arg=before)
    wait_for_rest(page)


def save(page, folder: Path) -> dict:
    """Save the recipe with the panel's button."""
    (folder / "blend.json").unlink(missing_ok=True)
    page.locator(".carproto-save-json").click()
    page.wait_for_function("document.querySelector('.carproto-message').innerText.includes('blend.json')")
    return json.loads((folder / "blend.json").read_text())


def test_sliders_are_those_of_the_stored_editor(page):
    labels = page.locator(".carproto-body .widget-label").all_inner_texts()
    assert labels[0] == "Height (%)" and page.locator(".carproto-body .noUi-handle").count() == len(labels)
    assert page.locator(".carproto-body .lm-TabBar-tabLabel").all_inner_texts() == ["Body"]


def test_a_key_lowers_both_cars_and_the_recipe_keeps_it(page, folder):
    plain = save(page, folder)
    assert plain["edits"] is None
    for _ in range(3):
        press(page, "PageDown", HANDLE)
    edited = save(page, folder)
    assert edited["edits"]["amounts"]["height"] < 0
    assert edited["edits"]["z_a"] == plain["z_a"] != edited["z_a"]
    for width in (1400, 900):
        for theme in ("Light", "Dark"):
            show_in(page, ".carproto-studio", width, theme)
            page.screenshot(path=SHOTS / f"body_{width}_{theme.lower()}.png")
            check_layout(page, ".carproto-body", ".noUi-target, button, .widget-label, .widget-readout")
    assert page.complaints == []


def test_reset_takes_the_edits_back(page, folder):
    before = picture(page)
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function("before => document.querySelector('img.carproto-picture').src !== before", arg=before)
    wait_for_rest(page)
    assert save(page, folder)["edits"] is None
