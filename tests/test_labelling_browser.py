"""The labelling panel in JupyterLab, in a real browser: buttons, keys, undo, and the saved labels."""

import sys
from pathlib import Path

import pytest

from carproto.app.labelling import KEYS
from carproto.data.labels import labels_path, read_labels
from carproto.data.views import render_views
from carproto.images import to_picture
from carproto.json_lines import read_json_lines

sys.path.insert(0, str(Path(__file__).parent))
from jupyter import SHOTS, browser, check_layout, open_notebook, serve_lab, show_in, write_notebook  # noqa: E402, F401

KEY_OF = {view: key for key, view in KEYS.items()}
N = 24
PANEL = """
import torch.nn.functional as F
from carproto.app.labelling import LabelPanel
panel = LabelPanel({folder!r}, lambda images: F.adaptive_avg_pool2d(images, 12), learn_from=12, learn_every=4)
panel
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of toy cars, and one file that is no image; the views stand in the names."""
    folder = tmp_path_factory.mktemp("labelling") / "cars"
    folder.mkdir()
    cars, views = render_views(N, 64, seed=2)
    for i, (car, view) in enumerate(zip(cars, views)):
        to_picture(car).resize((144, 96)).save(folder / f"car_{i:02d}_{view}.jpg", quality=92)
    (folder / "car_99_none.jpg").write_text("<html>not found</html>")
    return folder


@pytest.fixture(scope="module")
def page(browser, photos, tmp_path_factory):  # noqa: F811
    """The panel, opened over the folder."""
    write_notebook(photos.parent / "label.ipynb", PANEL.format(folder=str(photos)))
    with serve_lab(photos.parent, tmp_path_factory.mktemp("jupyter")) as url:
        page = open_notebook(browser, f"{url}/lab/tree/label.ipynb?reset", ".carproto-labels img.carproto-picture")
        page.wait_for_function("document.querySelector('img.carproto-picture').naturalWidth > 0")
        yield page


def visible(page) -> str:
    """Read the name of the visible photo."""
    return page.locator(".carproto-text").inner_text().split("\u00b7")[1].split("guess")[0].strip()


def truth_of(name: str) -> str:
    """Read the view off a name."""
    return Path(name).stem.split("_")[2]


def wait_for_count(page, count: int) -> None:
    """Wait until so many photos are labelled."""
    page.wait_for_function(
        "words => document.querySelector('.carproto-text').innerText.startsWith(words)",
        arg=f"All {count} photos" if count == N else f"{count} of {N} ",
    )


def image_bytes(page) -> bytes:
    """Fetch the bytes of the image that the browser shows."""
    fetch = """async () => {
        const picture = await fetch(document.querySelector('img.carproto-picture').src);
        return [...new Uint8Array(await picture.arrayBuffer())];
    }"""
    return bytes(page.evaluate(fetch))


def test_buttons_label(page, photos):
    for count in (1, 2, 3):
        name, before = visible(page), image_bytes(page)
        page.locator(f".carproto-label-{truth_of(name)}").click()
        wait_for_count(page, count)
        assert read_labels(photos)[name] == truth_of(name), "a label must be on disk when the next photo is shown"
        assert visible(page) != name and image_bytes(page) != before


def test_keys_label(page, photos):
    page.locator(".carproto-key input").click()
    for count in range(4, 13):
        name = visible(page)
        page.keyboard.press(KEY_OF[truth_of(name)])
        wait_for_count(page, count)
        assert read_labels(photos)[name] == truth_of(name)
    assert len(read_labels(photos)) == len(page.locator(".carproto-key input").input_value()) + 3 == 12


def test_the_panel_has_learned(page):
    """From the twelfth label on it predicts the view, and highlights its button."""
    guess = page.locator(".carproto-text").inner_text().split("guess: ")[1].split(" (")[0]
    marked = page.locator(".carproto-labels button.mod-info")
    assert marked.count() == 1 and marked.inner_text().split()[-1] == guess


def test_undo_by_button_and_key(page, photos):
    last = visible(page)
    page.locator(".carproto-label-other").click()
    wait_for_count(page, 13)
    assert read_labels(photos)[last] == "other"
    page.locator(".carproto-undo").click()
    wait_for_count(page, 12)
    assert visible(page) == last and last not in read_labels(photos)
    page.locator(".carproto-key input").click()
    page.keyboard.press("5")
    wait_for_count(page, 13)
    page.keyboard.press("0")
    wait_for_count(page, 12)
    assert visible(page) == last and last not in read_labels(photos)
    rows, broken = read_json_lines(labels_path(photos))
    assert not broken and [row["view"] for row in rows if row["file_name"] == last] == ["other", None, "other", None]


def test_fast_typing_labels_once_each(page, photos):
    """Keys that come faster than the kernel answers are each handled once, in order."""
    before, typed = len(read_json_lines(labels_path(photos))[0]), page.locator(".carproto-key input").input_value()
    page.locator(".carproto-key input").click()
    page.keyboard.type("474", delay=25)
    wait_for_count(page, 15)
    page.wait_for_timeout(1500)
    assert [row["view"] for row in read_json_lines(labels_path(photos))[0][before:]] == ["left", "rear-left", "left"]
    assert page.locator(".carproto-key input").input_value() == typed + "474"
    page.keyboard.type("000", delay=25)
    wait_for_count(page, 12)
    page.wait_for_timeout(1500)
    assert len(read_labels(photos)) == 12


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_screens_at_both_widths(page, theme):
    for width in (900, 1400):
        show_in(page, ".carproto-labels", width, theme)
        page.screenshot(path=SHOTS / f"labelling_{width}_{theme.lower()}.png")
        check_layout(page, ".carproto-labels", "img, button, input, .carproto-text, .carproto-message, .carproto-bar")


def test_a_new_panel_goes_on_and_ends(page, photos):
    """Run again, the panel loads the labels; after the last photo it says so, and stays usable."""
    labels = read_labels(photos)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(".carproto-labels img.carproto-picture")
    wait_for_count(page, 12)
    page.locator(".carproto-undo").click()
    page.wait_for_selector(".carproto-message [role=alert]")
    assert (
        "no label of this session" in page.locator(".carproto-message").inner_text() and read_labels(photos) == labels
    )
    page.locator(".carproto-key input").click()
    for count in range(13, N + 1):
        page.keyboard.press(KEY_OF[truth_of(visible(page))])
        wait_for_count(page, count)
    page.keyboard.press("1")
    page.wait_for_selector(".carproto-message [role=alert]")
    assert "all photos are labelled" in page.locator(".carproto-message").inner_text()
    page.screenshot(path=SHOTS / "labelling_done.png")
    assert read_labels(photos) == {path.name: truth_of(path.name) for path in photos.glob("car_[0-8]*.jpg")}
    assert not page.complaints
