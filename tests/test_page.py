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
    score = {"value": 0.5, "counts": {"n_train": 9}, "notes": []}
    report = {"dataset": "shapes3d", "source": "codes", "quick": True, "checkpoint": "</script>",
              "units": ["floor hue: unit 1"], "silent": [], "anchors": {}, "scores": {"mig": score}}
    picture, other = Image.new("RGB", (900, 300)), Image.new("RGB", (266, 66), "red")
    strips, loss = [[evaluate.inline(picture), evaluate.inline(other)]], [[0, 2.0], [9, 1.0]]
    slider = {"images": ["image 5"], "units": ["unit 0", "unit 1"], "stops": 4, "strips": strips}
    text = evaluate.page(report, {"lr": 1e-3}, {"matrix": picture}, loss, slider)
    (folder / "index.html").write_text(text, "utf-8")
    opened = Page((folder / "index.html").as_uri(), folder / "profile")
    with opened.process:
        yield opened
        opened.process.kill()


def test_by_keyboard_alone_tab_reaches_the_slider_and_arrows_turn_the_unit(page):
    for _ in range(4):  # past the table and two menus
        first = page.press("Tab", 9)
    assert page.press("ArrowRight", 39) != first
    assert page.js("document.getElementById('said').textContent") == "position 2 of 4"
    assert page.press("ArrowLeft", 37) == first


def test_another_unit_shows_another_picture(page):
    page.js(f"first = {SHOWN}, unit.focus()")
    assert page.press("ArrowDown", 40) != page.js("first")


def test_scores_notes_pictures_and_the_loss_are_shown_and_what_is_missing_is_not(page):
    text = page.js("document.body.innerText")
    assert "0.500" in text and "Silent units" in text and "from </script>" in text
    assert page.js("document.querySelector('#matrix img').naturalWidth") == 900
    assert page.js("document.querySelector('#loss polyline') && attention.hidden")


def test_at_phone_width_nothing_is_cut_off_or_scrolls_sideways(page):
    assert page.js("document.documentElement.scrollWidth") <= 390
