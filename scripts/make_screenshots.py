"""Writes the pictures of the playground in docs/, of the embedded model: `python scripts/make_screenshots.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from server.load import started

DOCS = Path(__file__).resolve().parent.parent / "docs"
DESK, PHONE = (1200, 1000), (360, 740)
SCORED = "The sun rose over the sea, and the old man looked at the ship that had come in the night."


def answers(page: Page) -> None:
    for name, value in {"seed": 51, "max_tokens": 40, "n": 3}.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#run")
    expect(page.locator(".answer h2 span:last-child")).to_have_text(["length"] * 3)


def score(page: Page) -> None:
    page.click("#tab-score")
    page.fill("#text", SCORED)
    page.click("#run-score")
    page.wait_for_selector("#scored .token >> nth=5")


def phone(page: Page) -> None:
    answers(page)
    page.click("#theme")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    pictures = ("playground", DESK, answers), ("playground-score", DESK, score), ("playground-phone", PHONE, phone)
    with started(None, ["--log-level", "warning"]) as (server, _, _), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height), act in pictures:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(server.url.removesuffix("/v1"))
            page.wait_for_selector("#model option", state="attached")
            act(page)
            page.screenshot(path=DOCS / f"{name}.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
