"""LPIPS is called as its package wants it; where it cannot be had, the error says why and what to do."""

import sys
from urllib.error import URLError

import numpy as np
import pytest

from qie.compiler.metrics.perceptual import SMALLEST, lpips
from qie.engines.errors import BackendMissingError
from tests.support.lpips import SCALE, install
from tests.support.photos import recolored, view

pytest.importorskip("torch")


def test_it_is_called_as_its_package_wants_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = install(monkeypatch)
    plain = view("cat", 48, height=40)
    changed = recolored(plain)
    expected = SCALE * float(np.mean(np.square((changed.astype(float) - plain) / 127.5)))
    assert lpips(changed, plain) == pytest.approx(expected, rel=1e-5)
    assert lpips(plain, plain) == 0
    assert calls == [{"net": "alex", "normalize": True, "shape": (1, 3, 40, 48)}] * 2
    assert capsys.readouterr() == ("", "")


def test_the_network_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    image = view("cat", 32)
    assert lpips(image, image) == 0
    monkeypatch.setattr(sys.modules["lpips"], "LPIPS", None)
    assert lpips(image, image) == 0


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(BackendMissingError) as caught:
        lpips(view("cat", 32), view("cat", 32))
    message = str(caught.value)
    assert message.startswith("lpips cannot be imported (import of lpips halted")
    assert message.endswith("), which LPIPS needs; run `pip install lpips`")


@pytest.mark.parametrize(
    "failure",
    [URLError("Name or service not known"), RuntimeError("invalid hash value"), PermissionError("read-only")],
    ids=lambda failure: type(failure).__name__,
)
def test_without_its_weights_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    install(monkeypatch, failure)
    with pytest.raises(BackendMissingError) as caught:
        lpips(view("cat", 32), view("cat", 32))
    assert str(caught.value) == (
        f"the weights that LPIPS needs cannot be loaded ({failure}); run "
        "`python -c 'import lpips; lpips.LPIPS(net=\"alex\")'` once where this machine is online"
    )


def test_images_have_one_shape_and_enough_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(AssertionError):
        lpips(view("cat", 32), view("cat", 48))
    with pytest.raises(AssertionError):
        lpips(view("cat", SMALLEST - 1), view("cat", SMALLEST - 1))
    assert lpips(view("cat", SMALLEST), view("cat", SMALLEST)) == 0
