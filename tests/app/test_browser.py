"""The page in a real browser (`make test-app`): Debian's chromium, driven by Playwright. Screenshots go to runs/app/."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from flowseg_jax.system.paths import ROOT

pytest.importorskip("gradio", reason="the extra `app` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]
SHOTS = ROOT / "runs" / "app"
SCENE = ROOT / "examples" / "scenes" / "00.png"
PATIENCE = 240_000  # milliseconds; the first answer compiles


@pytest.fixture(scope="module")
def address():
    """The page, served by the command in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "flowseg_jax", "app", f"--port={port}"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    server = subprocess.Popen(command, env=env, text=True, preexec_fn=heard, **pipes)
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if "the page is on" in line:
                break
        else:
            pytest.fail("".join(said))
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=60)[0]
        assert "Traceback" not in "".join(said) + rest


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        shown = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield shown
        shown.close()


def open_page(browser, address, width=1300, height=1000):
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    for _ in range(60):  # the address is printed just before the server listens
        try:
            page.goto(address)
            break
        except playwright.Error:
            page.wait_for_timeout(500)
    page.wait_for_selector("#go")
    return page


def segment(page, texts):
    page.fill("#texts textarea", texts)
    page.click("#go")


def upload(page, path):
    page.set_input_files("#image input[type=file]", str(path))
    page.wait_for_selector("#image img")


def test_expressions_about_an_uploaded_image(browser, address):
    page = open_page(browser, address)
    upload(page, SCENE)
    segment(page, "the big red triangle\nthe large diamond\nthe <b>little</b> striped triangle")
    page.wait_for_selector("#table tr:nth-child(4)")
    rows = [row.inner_text().split("\t") for row in page.locator("#table tr").all()[1:]]
    assert [row[1] for row in rows] == ["the big red triangle", "the large diamond", "the <b>little</b> striped triangle"]
    assert [row[2] for row in rows[:2]] == ["found", "found"] and int(rows[0][4]) == 951
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "answers.png", full_page=True)

    box = page.locator("#answers img").bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.4 * box["height"])  # on the diamond
    page.wait_for_selector("#owner img")
    assert "the large diamond" in page.locator("#here").inner_text()
    page.screenshot(path=SHOTS / "clicked.png", full_page=True)

    page.get_by_role("tab", name="Layers").click()
    page.wait_for_selector("#at-layer img")
    last = page.locator("#at-layer img").get_attribute("src")
    page.locator("#layer input[type=number]").fill("0")
    page.locator("#layer input[type=number]").press("Enter")
    page.wait_for_function("before => document.querySelector('#at-layer img')?.getAttribute('src') !== before", arg=last)
    assert "selected query" in page.locator("#figures").inner_text()
    page.screenshot(path=SHOTS / "layers.png", full_page=True)

    page.get_by_role("tab", name="Boundary").click()
    page.wait_for_selector("#boundary img")
    page.screenshot(path=SHOTS / "boundary.png", full_page=True)
    page.get_by_role("tab", name="Save").click()
    assert "from flowseg_jax import load" in page.locator("#code").inner_text()
    with page.expect_download() as coming:
        page.locator("#files a").first.click()
    saved = json.loads(open(coming.value.path()).read())
    assert saved[0]["text"] == "the big red triangle" and saved[0]["area"] == 951
    page.close()


def test_what_is_wrong_is_a_message(browser, address, tmp_path):
    page = open_page(browser, address)
    segment(page, "the big red triangle")
    page.get_by_text("choose an image").wait_for()
    upload(page, SCENE)
    segment(page, "   ")
    page.get_by_text("one expression per line", exact=False).nth(1).wait_for()
    (tmp_path / "broken.png").write_bytes(SCENE.read_bytes()[:200])
    page = open_page(browser, address)
    page.set_input_files("#image input[type=file]", str(tmp_path / "broken.png"))
    segment(page, "the big red triangle")
    page.wait_for_selector(".toast-body, .error")
    words = page.locator("body").inner_text()
    assert "Traceback" not in words and str(tmp_path) not in words
    page.screenshot(path=SHOTS / "broken.png", full_page=True)
    page.close()


def test_it_fits_a_phone(browser, address):
    page = open_page(browser, address, 390, 844)
    upload(page, SCENE)
    segment(page, "the large diamond")
    page.wait_for_selector("#answers img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 + 2  # nothing to scroll sideways
    page.screenshot(path=SHOTS / "phone.png", full_page=True)
    page.close()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(ROOT / "pyproject.toml"), str(ROOT / "checkpoints/shapes_tiny/config.json")]
)
def test_files_outside_the_uploads_are_not_served(address, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{address}gradio_api/file={path}")
    assert error.value.code in (403, 404)
