"""What a person does on the page, and what is seen there."""

import re
from pathlib import Path
from typing import Any

__all__ = ["choose", "count_urls", "edited", "start", "urls_alive"]

COUNTING = """
const made = new Set();
const create = URL.createObjectURL, revoke = URL.revokeObjectURL;
URL.createObjectURL = (blob) => { const url = create.call(URL, blob); made.add(url); return url; };
URL.revokeObjectURL = (url) => { made.delete(url); revoke.call(URL, url); };
window.urlsAlive = () => made.size;
"""


def choose(page: Any, *files: Path) -> None:
    """Choose images to edit."""
    page.set_input_files("#files", [str(file) for file in files])


def start(page: Any, prompt: str = "make it red", **options: str) -> None:
    """Enter an instruction and options, and start an edit."""
    page.fill("#prompt", prompt)
    if options and not page.locator("#steps").is_visible():
        page.click("summary")
    for name, value in options.items():
        page.fill(f"#{name}", value)
    page.click("#start")


def edited(page: Any, says: str = "Done") -> None:
    """Wait until the edit is done."""
    from playwright.sync_api import expect

    expect(page.locator("#state")).to_have_text(re.compile(f"^{says}"), timeout=60_000)


def count_urls(page: Any) -> None:
    """Count the addresses of blobs that the page keeps, from the next load on."""
    page.add_init_script(COUNTING)


def urls_alive(page: Any) -> int:
    """The addresses of blobs that the page has not given back."""
    alive: int = page.evaluate("urlsAlive()")
    return alive
