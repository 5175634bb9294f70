"""The site that `make docs` built: its links, and its pages in a headless Chromium.

`make browser` runs it; Chromium and its driver must be installed. Screenshots, to be looked at,
go to build/screenshots.
"""

import functools
import http.server
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

BUILD = Path(__file__).parents[1] / "build"
SITE = BUILD / "site"
FORMULAS = ["reference/measure", "reference/apply", "1_batch_normalization_by_hand"]
CODE = [
    "index",
    "guide/devices",
    "guide/performance",
    "reference/weights",
    "4_masks_and_many_devices",
]
ARGUMENTS = "headless no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars "
ARGUMENTS += "disable-background-networking disable-component-update disable-sync"


@pytest.fixture(scope="module")
def pages():
    """Every page, parsed."""
    return {p: BeautifulSoup(p.read_text(), "html.parser") for p in SITE.rglob("*.html")}


def test_every_link_leads_somewhere(pages):
    names = {p: {e.get("id") for e in page.find_all(id=True)} for p, page in pages.items()}
    for path, page in pages.items():
        for link in page.find_all("a", href=True):
            parts = urlsplit(link["href"])
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path}: {link['href']}"
            if parts.fragment and target in names:
                assert unquote(parts.fragment) in names[target], f"{path}: {link['href']}"


def test_nothing_is_loaded_from_elsewhere(pages):
    for path, page in pages.items():
        for element in page.find_all(["script", "img", "link", "iframe"]):
            address = element.get("src") or element.get("href") or ""
            assert not urlsplit(address).netloc, f"{path}: {address}"
            assert element.name == "link" or not address.startswith("/"), f"{path}: {address}"


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in ARGUMENTS.split():
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def look(browser, width, scheme):
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def open_page(browser, url, name):
    """Opens it, waits until formulas are set, and keeps a picture."""
    browser.get(url)
    ready = "return !window.MathJax || (MathJax.startup?.promise?.then(() => true) ?? false)"
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(ready))
    picture = BUILD / "screenshots" / f"{name.replace('/', '-')}.png"
    picture.parent.mkdir(exist_ok=True)
    browser.save_screenshot(picture)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 400])
@pytest.mark.parametrize("page", FORMULAS + CODE)
def test_a_page_renders(browser, address, page, width, scheme):
    look(browser, width, scheme)
    open_page(browser, f"{address}/{page}.html", f"{page}-{width}-{scheme}")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert (brightness(browser, "body", "background-color") < 128) == (scheme == "dark")
    assert (brightness(browser, "article p", "color") > 128) == (scheme == "dark")
    if page in FORMULAS:
        script = "return [...document.querySelectorAll('mjx-container')].map(e => e.offsetWidth)"
        widths = browser.execute_script(script)
        assert widths
        assert min(widths) > 0
        assert browser.execute_script("return document.querySelectorAll('.math').length") > 0
        text = browser.execute_script("return document.querySelector('article').innerText")
        assert not any(mark in text for mark in (r"\(", r"\[", "Math input error"))
    if page in CODE:
        keyword, plain = ".highlight :is(.k, .kn)", ".highlight pre"
        assert brightness(browser, keyword, "color") != brightness(browser, plain, "color")


def brightness(browser, selector, name):
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    color = browser.execute_script(script, selector, name)
    return sum(map(float, color[color.index("(") + 1 : -1].split(",")[:3])) / 3


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_the_search_finds_a_function(browser, address, scheme):
    look(browser, 1300, "light")
    browser.get_log("browser")
    browser.get(f"{address if scheme == 'http' else SITE.as_uri()}/search.html?q=pmerge")
    script = "return document.querySelector('#search-results li a')?.href"
    first = WebDriverWait(browser, 20).until(lambda b: b.execute_script(script))
    assert first.endswith("reference/measure.html#bnjax.pmerge")
    if scheme == "http":  # a browser reads no excerpts of the pages from files
        assert browser.get_log("browser") == []
