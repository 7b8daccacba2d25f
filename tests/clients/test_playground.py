"""The playground in headless Chromium: a person types, reads, hovers, compares, scores and copies."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from serving import RunningServer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ENDS = ".answer h2 span:last-child"  # where a card says how its answer ended


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: playwright.Browser, server: RunningServer) -> Iterator[playwright.Page]:
    """The page, loaded. Whatever is done with it: no console error, no request to anyone but this server."""
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith((server.url, "data:")) or problems.append(request.url))
    page.goto(server.url)
    playwright.expect(page.locator("#model option")).to_have_count(1)
    yield page
    context.close()
    assert problems == []


def fill(page: playwright.Page, **values: object) -> None:
    for name, value in values.items():
        page.fill(f"[name={name}]", str(value))


def test_it_streams_what_the_api_says(page: playwright.Page, server: RunningServer) -> None:
    page.fill("#prompt", "Hello")
    fill(page, seed=3, max_tokens=30)
    page.keyboard.press("Control+Enter")
    playwright.expect(page.locator(ENDS)).to_have_text("length")
    expected = server.complete(prompt="Hello", seed=3, max_tokens=30, temperature=0.7)["choices"][0]["text"]
    shown = page.evaluate("document.querySelector('.said').textContent.replaceAll('⏎', '')")
    assert shown == expected
    assert "30 tokens · first after" in page.inner_text("#figures")
    assert "tokens/s" in page.inner_text("#figures")


def test_a_token_shows_its_alternatives(page: playwright.Page) -> None:
    fill(page, seed=3, max_tokens=5)
    page.click("#run")
    playwright.expect(page.locator(ENDS)).to_have_text("length")
    page.hover(".token >> nth=1")
    assert page.locator("#tip tr").count() >= 5
    assert page.locator("#tip tr.own").count() == 1
    before = page.inner_text("#tip")
    page.focus(".token >> nth=1")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip") != before


def test_several_answers_stand_side_by_side(page: playwright.Page) -> None:
    fill(page, seed=3, max_tokens=8, n=3)
    page.click("#run")
    playwright.expect(page.locator(ENDS)).to_have_text(["length"] * 3)
    tops = page.evaluate("[...document.querySelectorAll('.answer')].map((card) => card.getBoundingClientRect().top)")
    assert len(tops) == 3
    assert len(set(tops)) == 1


def test_it_can_be_stopped(page: playwright.Page, server: RunningServer) -> None:
    fill(page, max_tokens=1000)
    page.click("#run")
    playwright.expect(page.locator(".token >> nth=3")).to_be_visible()
    page.keyboard.press("Escape")
    server.wait_until_idle()
    playwright.expect(page.locator("#stop")).to_be_disabled()
    assert page.is_hidden("#error")


def test_a_text_is_scored(page: playwright.Page, server: RunningServer) -> None:
    text = "It was a bright cold day — 日本."
    page.click("#tab-score")
    page.fill("#text", text)
    page.click("#run-score")
    playwright.expect(page.locator("#scored .token >> nth=5")).to_be_visible()
    assert page.evaluate("document.querySelector('#scored .said').textContent") == text
    rows = server.complete(prompt=text, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
    perplexity = 2.718281828459045 ** (-sum(rows[1:]) / len(rows[1:]))
    assert f"{len(rows)} tokens · perplexity {perplexity:.1f}" in page.inner_text("#score-figures")


def test_the_curl_it_copies_works(page: playwright.Page) -> None:
    page.fill("#prompt", 'It\'s "quoted" \\ and\nbroken: é')
    fill(page, seed=3, max_tokens=5, more='{"logit_bias": {"5": -100}}')
    page.click("#copy-curl")
    snippet = page.inner_text("#snippet")
    answer = json.loads(
        subprocess.run(["sh", "-c", f"{snippet} -sS"], capture_output=True, text=True, check=True).stdout
    )
    assert answer["usage"]["completion_tokens"] == 5
    page.click("#copy-python")
    compile(page.inner_text("#snippet"), "snippet", "exec")
    assert 'logit_bias={"5": -100}' in page.inner_text("#snippet")


def test_mistakes_are_said(page: playwright.Page, server: RunningServer) -> None:
    fill(page, more="{")
    page.click("#copy-curl")
    assert "JSON" in page.inner_text("#error")
    page.reload()
    assert page.is_hidden("#error")


def test_dark_light_and_a_phone(page: playwright.Page) -> None:
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != back
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_its_policy_lets_nothing_else_in(server: RunningServer) -> None:
    answer = httpx.get(server.url)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
