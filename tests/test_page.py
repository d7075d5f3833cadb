"""The report page in a real browser, by Chromium's own protocol: keyboard and phone width."""

import json
import os
import shutil
import subprocess

import pytest
from PIL import Image

import evaluate

BROWSER = os.name == "posix" and (shutil.which("chromium") or shutil.which("google-chrome"))
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here, or no POSIX pipes to it")
SHOWN = "document.getElementById('view').style.background"


class Page:  # a call is one order to the browser, and its answer
    def __init__(self, address, profile):
        (read, self.orders), (self.answers, write) = os.pipe(), os.pipe()
        flags = f'--headless --no-sandbox --disable-gpu --user-data-dir="{profile}"'
        pipes = f"--remote-debugging-pipe 3<&{read} 4>&{write} 2>/dev/null"  # orders, answers
        command = ["bash", "-c", f'exec "{BROWSER}" {flags} {pipes}']
        self.process = subprocess.Popen(command, pass_fds=(read, write))
        self.session, self.rest = {}, b""
        target = self("Target.createTarget", url=address)  # {"targetId": ...}
        self.session = self("Target.attachToTarget", flatten=True, **target)  # {"sessionId": ...}
        self("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1,
             mobile=True)
        while not self.js("document.readyState == 'complete' && document.title > 'Dis'"):
            pass

    def __call__(self, method, **parameters):
        order = {"id": 1, "method": method, "params": parameters} | self.session
        os.write(self.orders, json.dumps(order).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.answers, 1 << 16)
            message, self.rest = self.rest.split(b"\0", 1)
            if b'"id":1' in message:
                return json.loads(message)["result"]

    def js(self, expression):
        return self("Runtime.evaluate", expression=expression)["result"].get("value")

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        return self.js(SHOWN)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    four = {key: [0.75, 0.5, 1.0, 0.125] for key in ("moved", "kept", "control", "off")}
    report = {"dataset": "shapes3d", "source": "codes", "quick": True, "checkpoint": "</script>",
              "units": ["floor hue: unit 1"], "silent": [0], "anchors": {}, "paper": {},
              "factors": ["floor hue"], "nmi": [[0.25, 0.875]], "control": {"mean": four},
              "scores": {"mig": {"value": 0.5, "counts": {"n_train": 9}, "notes": []}}}
    picture, other = Image.new("RGB", (900, 300)), Image.new("RGB", (266, 66), "red")
    strips = {"floor hue: unit 1": {"stops": 4, "pictures": [evaluate.inline(picture)]},
              "unit 0": {"stops": 2, "pictures": [evaluate.inline(other)]}}
    log = "".join(json.dumps({"images": i, "loss": 2 - i}) + "\n" for i in range(2)) + '{"cut'
    text = evaluate.page(report, {"lr": 1e-3}, {"interchange": picture}, log,
                         {"images": ["image 5"], "strips": strips})
    (folder / "index.html").write_text(text, "utf-8")
    opened = Page((folder / "index.html").as_uri(), folder / "profile")
    with opened.process:
        yield opened
        opened.process.kill()


def test_by_keyboard_alone_tab_reaches_the_slider_and_arrows_turn_the_factor(page):
    for _ in range(3):  # past two menus
        first = page.press("Tab", 9)
    assert page.press("ArrowRight", 39) != first
    assert page.js("document.getElementById('said').textContent") == "value 2 of 4"
    assert page.press("ArrowLeft", 37) == first


def test_a_thumbnail_shows_each_value_and_a_click_on_it_takes_that_value(page):
    assert page.js("values.children.length") == 4
    page.js("values.children[3].click()")
    assert page.js("said.textContent + values.children[3].className") == "value 4 of 4chosen"


def test_another_unit_shows_another_picture_within_its_own_values(page):
    page.js(f"first = {SHOWN}, unit.focus()")
    assert page.press("ArrowDown", 40) != page.js("first")
    assert page.js("said.textContent") == "value 2 of 2"


def test_the_page_leads_with_the_slider_and_ends_with_the_notes(page):
    order = page.js("[...document.querySelectorAll('[id]')].map(x => x.id).join(' ')").split()
    places = [order.index(name) for name in
              ("player", "matrix", "interchange", "control", "scores", "loss", "notes")]
    assert places == sorted(places) and order[-1] == "notes"


def test_scores_control_notes_pictures_and_the_loss_are_shown_and_what_is_missing_is_not(page):
    text = page.js("document.body.innerText")
    for words in ("0.500", "Silent units", "from </script>", "best unit alone\t0.500", "train 9"):
        assert words in text
    assert page.js("document.querySelector('#interchange img').naturalWidth") == 900
    assert page.js("document.querySelector('#loss polyline') && attention.hidden")


def test_a_cell_of_the_matrix_is_the_darker_the_more_its_unit_knows_and_units_have_names(page):
    head, row = page.js("document.querySelector('#matrix').innerText").splitlines()[-2:]
    assert head.split("\t")[1:] == ["floor hue: unit 1", "(0)"] and "0.88\t0.25" in row
    colours = page.js("[...document.querySelectorAll('#matrix td')].slice(1).map("
                      "x => x.style.background.match(/\\d+/)[0]).join(' ')").split()
    assert int(colours[0]) < int(colours[1])  # of red


def test_at_phone_width_nothing_is_cut_off_or_scrolls_sideways(page):
    assert page.js("document.documentElement.scrollWidth") <= 390
