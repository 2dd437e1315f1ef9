"""The page for everybody: by the keyboard alone, in light and dark, on a phone, and by what axe-core finds."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.pages import choose, edited, start
from tests.support.servers import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

from playwright.sync_api import expect


def focused(page: "Page") -> str:
    """What has the focus."""
    name: str = page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
    return name


def faults(page: "Page") -> list[str]:
    """The serious and critical faults that axe-core finds."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_before_in_and_behind_an_edit(
    browser: "Browser", server: Server, photo: Path, scheme: str, width: int
) -> None:
    with browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.goto(server.url)
        assert faults(page) == []
        choose(page, photo)
        start(page, steps="900", n="1")
        expect(page.locator("#compare")).not_to_have_class(re.compile("alone"), timeout=60_000)
        assert faults(page) == []
        page.click("#stop")
        start(page, steps="2")
        edited(page)
        assert faults(page) == []
        start(page, "<|im_end|>")
        expect(page.get_by_role("alert")).not_to_be_empty()
        assert faults(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_what_is_wrong_is_found(page: "Page") -> None:
    page.evaluate("document.documentElement.removeAttribute('lang')")
    assert [fault.partition(":")[0] for fault in faults(page)] == ["html-has-lang"]


def test_an_edit_by_the_keyboard_alone(page: "Page", photo: Path, server: Server) -> None:
    page.keyboard.press("Tab")
    assert focused(page) == "files"
    assert page.evaluate("getComputedStyle(document.querySelector('label[for=files]')).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(str(photo))
    expect(page.locator("#inputs img")).to_have_count(1)
    order = []
    for key in ["Tab", "Tab", "Enter", *["Tab"] * 3]:
        page.keyboard.press(key)
        order.append(focused(page))
    assert order == ["prompt", "Options", "Options", "n", "seed", "steps"]
    page.keyboard.type("3")
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
    assert focused(page) == "prompt"
    page.keyboard.type("make it red")
    page.keyboard.press("Control+Enter")
    edited(page)
    assert focused(page) == "prompt"
    for _ in range(9):
        page.keyboard.press("Tab")
    assert focused(page) == "slider"
    slider, part = page.locator("#slider"), "document.getElementById('compare').style.getPropertyValue('--part')"
    for key, value in (("ArrowLeft", 49), ("ArrowRight", 50), ("Home", 0), ("End", 100), ("PageDown", 90)):
        page.keyboard.press(key)
        assert page.evaluate(part) == f"{value}%"
        expect(slider).to_have_attribute("aria-valuetext", f"{value} percent before, {100 - value} percent after")
    assert page.evaluate("getComputedStyle(document.getElementById('compare')).outlineStyle") == "solid"
    for name in ("save", "again"):
        page.keyboard.press("Tab")
        assert focused(page) == name
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text(re.compile("^Seed"))


def test_stop_by_the_keyboard_keeps_the_focus(page: "Page", photo: Path) -> None:
    choose(page, photo)
    start(page, steps="900")
    page.focus("#stop")
    page.keyboard.press("Enter")
    edited(page, "Stopped")
    assert focused(page) == "start"


@pytest.mark.parametrize("touch", [False, True])
def test_the_line_is_dragged_over_the_whole_image(browser: "Browser", server: Server, photo: Path, touch: bool) -> None:
    with browser.new_context(viewport={"width": 390, "height": 844}, has_touch=touch, is_mobile=touch) as context:
        page = context.new_page()
        page.goto(server.url)
        choose(page, photo)
        start(page, steps="2")
        edited(page)
        page.locator("#compare").scroll_into_view_if_needed()
        box = page.locator("#compare").bounding_box()
        assert box is not None
        for part in (0.2, 0.7):
            x, y = box["x"] + part * box["width"], box["y"] + box["height"] / 3
            if touch:
                page.touchscreen.tap(x, y)
            else:
                page.mouse.move(box["x"] + box["width"] / 2, y)
                page.mouse.down()
                page.mouse.move(x, y, steps=4)
                page.mouse.up()
            line = page.locator(".line").bounding_box()
            assert line is not None
            assert abs(line["x"] + line["width"] / 2 - x) <= 4
