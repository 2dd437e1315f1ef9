"""What surrounds every command: signals, streams, and what an error prints.

Little is imported before a signal is handled; the commands come with ``qie.compiler.cli.app``.
"""

import codecs
import contextlib
import os
import signal
import sys
import time
import traceback
from types import FrameType
from typing import Any, NoReturn

__all__ = ["STOPPING", "main"]

BUG = 70
"""Exit code of an error that qie did not expect (sysexits.h, EX_SOFTWARE)."""

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command as Ctrl-C does: what it was writing is removed, what is complete stays."""


PATIENCE = 2.0
"""Seconds in which a second signal is ignored; later it ends what the first one did not."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        received: the signal that came last; None before the first.
        at: when that was, on the monotonic clock.
    """

    received: int | None = None
    at = 0.0


def main() -> None:
    """Run the command line; an error of qie becomes one sentence on stderr and its exit code.

    Exit codes: 0 done, 2 usage or environment, 70 a bug of qie, 128 + N ended by signal N.
    """
    _prepare_streams()
    Stopped.received = None
    for number in STOPPING:
        signal.signal(number, _stop_by_signal)
    try:
        _run()
    finally:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)  # all is done, and the interpreter is about to exit


def _run() -> None:
    try:
        from qie.compiler.cli.app import app

        app()
    except SystemExit as stop:
        if Stopped.received is not None:
            _say("stopped", 128 + Stopped.received)
        if isinstance(stop.__context__, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise
    except KeyboardInterrupt:
        _say("stopped", 128 + (Stopped.received or signal.SIGINT))
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)
    except Exception as problem:
        if Stopped.received is not None:  # a library answered the signal with an error of its own
            _say("stopped", 128 + Stopped.received)
        _explain(problem)


def _explain(problem: Exception) -> NoReturn:
    """Print what went wrong and exit with its code; with QIE_DEBUG set, after the traceback."""
    from qie.engines.errors import QieError, first_line
    from qie.engines.files import is_disk_full

    if os.environ.get("QIE_DEBUG"):
        traceback.print_exception(problem)
    if isinstance(problem, QieError):
        flag = _flag(problem.option)
        _say(f"error: {problem} ({flag})" if flag else f"error: {problem}", problem.exit_code)
    if isinstance(problem, MemoryError):
        _say("error: this machine has too little memory; close other programs or use a smaller model", 2)
    if isinstance(problem, OSError) and is_disk_full(problem):
        _say(f"error: the disk of {problem.filename or 'this folder'} is full; free some space", 2)
    if isinstance(problem, OSError) and problem.strerror:
        place = problem.filename or "a file"
        _say(f"error: {place} cannot be used ({problem.strerror}); check its name and permissions", 2)
    _say(
        f"error: this is a bug of qie ({type(problem).__name__}: {first_line(problem)}, in {_place(problem)}); report "
        "it with this line, the command and the output of `qie doctor`, or set QIE_DEBUG=1 to see where it comes from",
        BUG,
    )


def _place(problem: Exception) -> str:
    """Where in qie an unexpected error arose: ``engines/bundle/bundle.py:12``."""
    import qie

    package = qie.__file__.removesuffix("__init__.py")
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if frame.filename.startswith(package)]
    if not frames:
        return "another package"
    return f"{frames[-1].filename.removeprefix(package)}:{frames[-1].lineno}"


def _stop_by_signal(number: int, _: FrameType | None) -> None:
    """End by an exception, so that everything half-written is removed; an impatient signal does not disturb that."""
    now = time.monotonic()
    if Stopped.received is not None and now - Stopped.at < PATIENCE:
        return
    Stopped.received, Stopped.at = number, now
    raise Stopped


def _say(text: str, code: int) -> NoReturn:
    from qie.engines.terminal import printable

    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # nobody reads
            print(printable(text), file=sys.stderr)
    sys.exit(code)


def _flag(option: str | None) -> str | None:
    """The flag of the running command for the ``option`` of an error."""
    if option is None:
        return None
    import typer

    from qie.compiler.cli.app import ARGUMENTS, app

    command = typer.main.get_group(app).commands.get(sys.argv[1]) if len(sys.argv) > 1 else None
    name = ARGUMENTS.get(option, option)
    flags = [flag for p in getattr(command, "params", ()) if p.name == name for flag in p.opts if flag.startswith("--")]
    return flags[0] if flags else None


def _prepare_streams() -> None:
    """Standard streams that take any text, and are there: a file opened later must not get the number of one."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    codecs.register_error("qie", _bytes_or_escapes)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="qie")


def _bytes_or_escapes(problem: UnicodeError) -> tuple[Any, int]:
    """The bytes of a file's name that are no text as they are; other text that a stream cannot show as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(problem)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(problem)
