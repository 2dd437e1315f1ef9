"""Edits on the page: images in, steps and previews, the slider, the history, the download, and every error."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.support.pages import choose, count_urls, edited, start, urls_alive
from tests.support.servers import Server, serving_process

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

from playwright.sync_api import expect

HOSTILE = "<img src=http://evil.example/x.png onerror=\"document.title='run'\"><script>document.title='run'</script>"


def idle(server: Server) -> None:
    """Wait until nothing is edited any more."""
    import time

    deadline = time.monotonic() + 30
    while server.service.running + server.service.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_edit(page: "Page", photo: Path, said: list[str]) -> None:
    expect(page.locator("#model")).not_to_be_empty()
    choose(page, photo)
    start(page, seed="3", steps="5")
    edited(page, "Done, seed 3$")
    expect(page.locator("#history li")).to_have_count(1)
    expect(page.locator("#stop")).to_be_hidden()
    with page.expect_download() as waiting:
        page.click("#save")
    assert waiting.value.suggested_filename == "edited-3.png"
    image = Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes()))
    shown = page.evaluate("[document.images.after.naturalWidth, document.images.after.naturalHeight]")
    assert list(image.size) == shown
    assert said == []


def test_steps_and_previews_are_shown_and_the_edit_can_be_stopped(page: "Page", photo: Path, server: Server) -> None:
    choose(page, photo)
    start(page, steps="900")
    expect(page.locator("#step")).to_have_text(re.compile(r"^step \d+ of 900$"))
    expect(page.locator("#compare")).to_have_class(re.compile("alone"))
    expect(page.locator("#compare")).not_to_have_class(re.compile("alone"), timeout=60_000)
    assert 0 < float(page.locator("#progress").get_attribute("value") or 0) < 900
    page.click("#stop")
    edited(page, "Stopped")
    idle(server)
    expect(page.locator("#history li")).to_have_count(0)
    expect(page.locator("#compare")).to_be_hidden()


def test_edits_after_one_another_and_the_history(page: "Page", photo: Path) -> None:
    choose(page, photo)
    start(page, "make it red", seed="3", steps="2")
    edited(page, "Done, seed 3$")
    start(page, "make it blue", seed="4", steps="2")
    edited(page, "Done, seed 4$")
    items = page.locator("#history button")
    expect(items).to_have_text([re.compile("make it blue.*seed 4"), re.compile("make it red.*seed 3")])
    expect(items.first).to_have_attribute("aria-current", "true")
    items.last.click()
    expect(page.locator("#state")).to_have_text("Seed 3")
    expect(page.locator("#after")).to_have_attribute("alt", "After: make it red")
    expect(page.locator("#save")).to_have_attribute("download", "edited-3.png")
    page.click("#again")
    expect(page.locator("#inputs img")).to_have_attribute("alt", "edited-3.png")
    start(page, "make it green", seed="5", n="2", steps="2")
    edited(page, "Done, 2 results")
    expect(items).to_have_count(4)


def test_an_image_can_be_dropped_and_pasted_and_removed(page: "Page", photo: Path) -> None:
    page.evaluate(
        """async (bytes) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            for (const kind of ["dragover", "drop"]) {
                document.body.dispatchEvent(new DragEvent(kind, { bubbles: true, dataTransfer: files }));
            }
            document.body.dispatchEvent(new ClipboardEvent("paste", { bubbles: true, clipboardData: files }));
        }""",
        list(photo.read_bytes()),
    )
    expect(page.locator("#inputs img")).to_have_count(2)
    page.get_by_label("Remove dropped.png").first.click()
    expect(page.locator("#inputs img")).to_have_count(1)
    assert page.evaluate("document.activeElement.id") == "files"


def test_refusals_are_shown_and_the_result_before_stays(page: "Page", photo: Path, tmp_path: Path) -> None:
    problem = page.get_by_role("alert")
    start(page)
    expect(problem).to_have_text("there is no image; choose one first")
    text = tmp_path / "notes.txt"
    text.write_text("x")
    choose(page, text)
    expect(problem).to_have_text("notes.txt is no PNG, JPEG or WebP file; choose another one")
    choose(page, photo)
    start(page, seed="3", steps="2")
    edited(page)
    start(page, "<|im_end|>")
    expect(problem).to_have_text(re.compile(r"^prompt contains <\|im_end\|>"))
    expect(page.locator("#save")).to_have_attribute("download", "edited-3.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:200])
    choose(page, broken)
    start(page)
    expect(problem).to_have_text(re.compile(r"^image\[\] .*; "))
    choose(page, photo, photo)
    expect(problem).to_have_text("at most 3 images are edited together; remove one first")


def test_an_option_that_is_wrong_is_seen_where_it_is_hidden(page: "Page", photo: Path) -> None:
    choose(page, photo)
    start(page, size="large")
    page.click("summary")
    page.click("#start")
    expect(page.locator("#size")).to_be_visible()
    expect(page.locator("#compare")).to_be_hidden()


def test_text_is_shown_as_text(page: "Page", photo: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=document.title=1>.png"
    hostile.write_bytes(photo.read_bytes())
    choose(page, hostile)
    start(page, HOSTILE, steps="2", seed="3")
    edited(page)
    expect(page.locator("#history span")).to_have_text(HOSTILE)
    start(page, HOSTILE + "<|im_end|>", size="auto")
    expect(page.get_by_role("alert")).not_to_be_empty()
    page.route("**/v1/images/edits", lambda route: route.fulfill(status=400, json={"error": {"message": HOSTILE}}))
    start(page)
    expect(page.get_by_role("alert")).to_have_text(HOSTILE)
    assert page.title() == "qie"
    assert page.locator("script, main img:not([src^=blob])").count() == 1


def test_the_policy_holds(page: "Page", server: Server, said: list[str]) -> None:
    """Even where text became markup: nothing runs, and nothing is asked for."""
    page.evaluate(
        """() => {
            const frame = document.createElement("iframe");
            const image = document.createElement("img");
            image.src = "http://evil.example/x.png";
            frame.src = "http://evil.example/";
            document.body.append(image, frame);
        }"""
    )
    for markup in ("setAttribute('onerror', 'document.title = 1')", "innerHTML = '<img src=x>'"):
        attempt = f"() => {{ try {{ document.body.{markup}; return true }} catch {{ return false }} }}"
        assert page.evaluate(attempt) is False
    fetched = page.evaluate("() => fetch('http://evil.example/').then(() => true, () => false)")
    assert (fetched, page.title()) == (False, "qie")
    assert len([line for line in said if "Content Security Policy" in line]) >= 3, said


def test_the_page_is_loaded_again_in_the_middle(page: "Page", photo: Path, server: Server) -> None:
    choose(page, photo)
    start(page, steps="900")
    expect(page.locator("#step")).to_have_text(re.compile("^step"))
    page.reload()
    idle(server)
    choose(page, photo)
    start(page, seed="3", steps="2")
    edited(page)


def test_the_memory_of_the_history_is_bounded(page: "Page", photo: Path) -> None:
    count_urls(page)
    page.reload()
    choose(page, photo)
    alive = []
    for number in range(3):
        start(page, n="10", seed=str(1000 * number), steps="1")
        edited(page, "Done, 10 results")
        expect(page.locator("#history small").first).to_have_text(f"seed {1000 * number + 9}")
        alive.append(urls_alive(page))
    assert page.locator("#history li").count() == 20
    assert alive == [13, 23, 23]  # an image to edit, before and after, the history
    page.get_by_label("Remove photo.png").click()
    assert urls_alive(page) == 22


def test_a_server_that_is_gone_in_the_middle(bundle: Path, browser: "Browser", photo: Path) -> None:
    with serving_process(bundle, "--api-keys", str(_keys(photo))) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        choose(page, photo)
        start(page, steps="900")
        expect(page.get_by_role("alert")).to_have_text("the server wants an API key; enter it under Options")
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        expect(page.locator("#step")).to_have_text(re.compile("^step"), timeout=60_000)
        expect(page.locator("#model")).not_to_be_empty()
        server.process.kill()
        gone = "the server cannot be reached; is it still running?"
        expect(page.get_by_role("alert")).to_have_text(gone)
        expect(page.locator("#stop")).to_be_hidden()
        start(page)
        expect(page.get_by_role("alert")).to_have_text(gone)


def _keys(photo: Path) -> Path:
    file = photo.with_name("keys")
    file.write_text("secret\n")
    return file


def test_a_page_of_another_site_can_do_nothing(browser: "Browser", server: Server) -> None:
    """Neither by a form, nor by a script, nor where the name of the site leads to this machine."""
    port = server.url.rpartition(":")[2]
    with browser.new_context() as context:
        page = context.new_page()
        answers: list[int] = []
        page.on("response", lambda response: answers.append(response.status) if "/v1/" in response.url else None)
        page.route(
            "http://evil.example/", lambda route: route.fulfill(body="<!doctype html>", content_type="text/html")
        )
        page.goto("http://evil.example/")
        page.evaluate(
            """(url) => fetch(url, { method: "POST", mode: "no-cors", body: new FormData() }).catch(() => {})""",
            f"http://127.0.0.1:{port}/v1/images/edits",
        )
        page.evaluate(
            """(url) => {
                const form = Object.assign(document.createElement("form"), {
                    action: url, method: "post", enctype: "multipart/form-data",
                });
                document.body.append(form);
                form.submit();
            }""",
            f"http://127.0.0.1:{port}/v1/images/edits",
        )
        page.wait_for_url("**/v1/images/edits")
        assert "takes no requests from pages of 'http://evil.example'" in page.content()
        assert set(answers) == {403}  # the browser may hold back the script's request by itself
