"""The report page in a real browser, driven over Chromium's own protocol: keyboard, phone width, no network."""

import fcntl
import json
import os
import shutil
import subprocess
from itertools import count

import pytest
import torch

import evaluate

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here (Debian: apt-get install chromium)")


class Page:
    """A page in headless Chromium, 390 pixels wide like a phone, spoken to in JSON over two pipes."""

    def __init__(self, address, profile):
        to_browser, self.send_end = os.pipe()
        self.receive_end, from_browser = os.pipe()

        def pipes():  # the browser reads its orders from descriptor 3 and answers on 4
            copies = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]  # clear of 3 and 4
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)
        self.process = subprocess.Popen(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={profile}"], preexec_fn=pipes, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.numbers, self.session, self.rest = count(1), None, b""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        self.requests = []
        self("Network.enable")
        self("Page.navigate", url=address)
        while self.js("document.readyState + !!document.getElementById('slider')") != "completetrue":
            pass

    def __call__(self, method, **parameters):
        """One order and its answer. What the page asks of the network meanwhile is noted in `requests`."""
        number = next(self.numbers)
        order = {"id": number, "method": method, "params": parameters}
        order |= {"sessionId": self.session} if self.session else {}
        os.write(self.send_end, json.dumps(order).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.receive_end, 1 << 16)
                assert part, "the browser has gone"
                self.rest += part
            message, self.rest = self.rest.split(b"\0", 1)
            message = json.loads(message)
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def js(self, expression):
        return self("Runtime.evaluate", expression=expression)["result"].get("value")

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    moved = torch.randint(256, (2, 3, 4, 3, 64, 64), dtype=torch.uint8)  # 2 images, 3 units, 4 positions
    report = {"images": "shapes3d, rendered twin", "dataset": "shapes3d", "source": "rendered", "quick": True,
              "checkpoint": "ckpt.pt", "images_seen": 1, "minutes": 1.0, "pca_images": 1, "figures": [],
              "separation": {}, "delta": {}, "scores": {"mig": dict(
                  value=0.5, std=None, values=[0.5], counts={"n_train": 9}, seeds=[0], seconds=1, notes=[])}}
    interactive = evaluate.player(moved, [5, 17], ["unit 0", "unit 1", "unit 2"])
    (folder / "index.html").write_text(evaluate.page(report, {"lr": 1e-3}, folder, interactive), encoding="utf-8")
    opened = Page((folder / "index.html").as_uri(), folder / "profile")
    yield opened
    opened.process.kill()
    opened.process.wait()


def test_by_keyboard_alone_tab_reaches_the_slider_and_arrows_turn_the_unit(page):
    shown = "document.getElementById('view').style.background"
    for _ in range(10):
        if page.js("document.activeElement.id") == "slider":
            break
        page.press("Tab", 9)
    assert page.js("document.activeElement.id") == "slider"
    first = page.js(shown)
    page.press("ArrowRight", 39)
    assert page.js("document.getElementById('said').textContent") == "position 2 of 4"
    assert page.js(shown) != first
    page.press("ArrowLeft", 37)
    assert page.js(shown) == first


def test_another_unit_shows_another_picture(page):
    shown = "document.getElementById('view').style.background"
    first = page.js(shown)
    page.js("document.getElementById('unit').focus()")
    page.press("ArrowDown", 40)
    assert page.js("document.getElementById('unit').selectedIndex") == 1 and page.js(shown) != first


def test_at_phone_width_nothing_is_cut_off_or_scrolls_sideways(page):
    assert page.js("document.documentElement.scrollWidth") <= 390


def test_the_page_asks_for_nothing_but_itself(page):
    assert not [url for url in page.requests if not url.startswith(("data:", "about:", "file:"))]
