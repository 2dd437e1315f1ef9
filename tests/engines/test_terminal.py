"""What a person sees: tables, numbers and bars; bars on a terminal alone."""

import io
import re
import sys
import time
from collections.abc import Callable

import pytest

from qie.engines.terminal import Bars, ago, human_bytes, human_count, human_memory, human_seconds, table, wrap


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Puts a terminal in the place of stderr; called by the test, because pytest puts its own there before it."""

    def open_terminal() -> Terminal:
        screen = Terminal()
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return open_terminal


def plain(screen: Terminal) -> str:
    """What was drawn, without colors."""
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())


def work(bars: Bars) -> None:
    with bars:
        for done in range(5):
            bars("denoise", done, 4)


def test_bars_are_drawn_with_percentage(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    work(Bars())
    assert "denoise" in screen.getvalue()
    assert "100%" in screen.getvalue()


def test_a_bar_for_each_kind_of_work(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    with Bars() as bars:
        bars("vision", 1, 1)
        bars("language", 1, 2)
    drawn = screen.getvalue()
    assert re.search(r"vision .*100%", drawn)
    assert re.search(r"language .*\b50%", drawn)


def test_bars_are_taken_down_when_work_fails(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    with pytest.raises(ZeroDivisionError), Bars() as bars:
        bars("vision", 0, 1)
        raise ZeroDivisionError
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_work_in_bytes_shows_bytes_a_second_and_the_time_left(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    now = [100.0]
    with Bars(clock=lambda: now[0]) as bars:
        for second in range(5):
            now[0] = 100.0 + second
            bars("transformer", second * 1_500_000_000, 24_000_000_000)
            bars("images", second, 40)
    assert re.search(r"transformer \S+ +25% +1\.5 GB/s 0:00:12", plain(screen))
    assert re.search(r"images \S+ +10% +0:00:36", plain(screen))


def test_bytes_a_second_of_all_when_done(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    now = [0.0]
    with Bars(clock=lambda: now[0]) as bars:
        for step in range(3):
            now[0] = step
            bars("digest", step * 10**6, 2 * 10**6)
    assert re.search(r"digest \S+ 100% +1\.0 MB/s 0:00:02", plain(screen))


def test_no_bars_where_they_are_not_wanted(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    work(Bars(enabled=False))
    assert screen.getvalue() == ""


def test_no_bars_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    work(Bars())
    assert capsys.readouterr() == ("", "")


def test_table() -> None:
    text = table([["vision", "80 k"], ["vae_encoder", "1 M"]], header=["component", "size"], right=[1])
    assert text.splitlines() == [
        "component    size",
        "-----------  ----",
        "vision       80 k",
        "vae_encoder   1 M",
    ]


def test_table_without_header_or_rows() -> None:
    assert table([["a", "b"], ["ccc", ""]]) == "a    b\nccc"
    assert table([]) == ""
    assert table([], header=["a", "b"]) == "a  b\n-  -"


def test_a_wide_table_is_wrapped_between_words() -> None:
    rows = [["onnxruntime", "onnx 1.19, onnxscript 0.7, safetensors 0.5", "12 MB"], ["short", "none", "1 MB"]]
    text = table(rows, header=["backend", "packages", "size"], right=[2], width=46)
    assert text.splitlines() == [
        "backend      packages                     size",
        "-----------  --------------------------  -----",
        "onnxruntime  onnx 1.19, onnxscript 0.7,  12 MB",
        "             safetensors 0.5",
        "short        none                         1 MB",
    ]


def test_words_are_never_broken() -> None:
    path = "/a/very/long/path/that-has-hyphens/in-it"
    assert table([["bundle", path]], width=20) == f"bundle  {path}"


def test_the_width_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ["capability", " ".join(["package"] * 12)]
    for columns in (40, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = table([row]).splitlines()
        assert max(map(len, lines)) <= columns
        assert (len(lines) == 1) == (columns == 120)
        assert all(len(line) <= columns for line in wrap(row[1], indent=4).splitlines())


def test_commands_are_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert wrap("there is no bundle; build one with `qie build pocket`").splitlines() == [
        "there is no bundle; build one",
        "with `qie build pocket`",
    ]


def test_notes_stand_below_their_rows() -> None:
    text = table(
        [["tensorrt", "no"], ["onnxruntime", "yes"]], header=["backend", "ready"], notes=["first\nsecond", None]
    )
    assert text.splitlines()[2:] == ["tensorrt     no", "    first", "    second", "onnxruntime  yes"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_249, "4.2 kB"), (999_499, "999.5 kB"), (999_500, "1.0 MB"),
     (57_700_000_000, "57.7 GB"), (3 * 10**12, "3.0 TB"), (5 * 10**15, "5000.0 TB")],
)  # fmt: skip
def test_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (44.5 * 2**30, "44.5 GiB"),
     (1004.2 * 1024, "1.0 MiB")],
)  # fmt: skip
def test_memory(count: float, text: str) -> None:
    assert human_memory(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.58e-6, "1.6 µs"), (4e-7, "0.4 µs"), (0.0123, "12 ms"), (0.00123, "1.2 ms"), (4.52, "4.5 s"), (99.9, "100 s"),
     (7200, "120 min"), (0, "0.0 µs")],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (80_480, "80.48 k"), (13_511_000_000, "13.51 B"), (10**6, "1.00 M")],
)
def test_counts(count: int, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "just now"), (0, "just now"), (59, "just now"), (60, "1 minute ago"), (3599, "59 minutes ago"),
     (3600, "1 hour ago"), (7200, "2 hours ago"), (86400, "1 day ago"), (10**6, "11 days ago")],
)  # fmt: skip
def test_ago(seconds: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.5)
    assert ago(2_000_000_000.5 - seconds) == text
