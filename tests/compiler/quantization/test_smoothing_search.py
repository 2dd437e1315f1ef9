"""The search in blocks finds what the plain formula finds, and a part of the columns decides as all of them do."""

from collections.abc import Mapping

import numpy as np
import pytest

from qie.compiler.quantization import smoothing_search
from qie.compiler.quantization.schemes import SCHEMES, Scheme
from qie.compiler.quantization.smoothing import Group, smoothing_scales
from qie.compiler.quantization.smoothing_search import ALPHAS, Observed, best_smoothing
from qie.compiler.recipe.schema import SchemeName

SMOOTHED: list[SchemeName] = [name for name, scheme in SCHEMES.items() if scheme.smoothed]
GROUP = Group(name="g", consumers=("a", "b"), producers=(("norm.weight", "divide_rows"),))


def outliers(out: int, seed: int, width: int = 256) -> tuple[dict[str, Observed], dict[str, np.ndarray]]:
    """Inputs with channels of very different ranges, and weights [width, out]."""
    rng = np.random.default_rng(seed)
    ranges = np.exp(rng.normal(0, 1.2, width)).astype(np.float32)
    fitted, judged = (rng.standard_normal((64, width), np.float32) * ranges for _ in range(2))
    amax = np.abs(np.concatenate([fitted, judged])).max(0)
    seen = Observed(rows=judged, fitted_amax=np.abs(fitted).max(0), amax=amax)
    return dict.fromkeys("ab", seen), {n: rng.standard_normal((width, out), np.float32) / 16 for n in "ab"}


def plain_error(
    scheme: Scheme, observed: Mapping[str, Observed], weights: Mapping[str, np.ndarray], scales: np.ndarray
) -> float:
    total = 0.0
    for name, weight in weights.items():
        seen = observed[name]
        x = seen.rows / scales
        if scheme.inputs is not None:
            x = scheme.inputs.fake_quantize(x, scheme.inputs.scale_from_amax((seen.fitted_amax / scales).max()))
        exact = seen.rows @ weight
        product = x @ scheme.weights.fake_quantize(weight * scales[:, None])
        total += float(np.square(product - exact).mean() / np.square(exact).mean())
    return total


def tried(scheme: Scheme, observed: Mapping[str, Observed], weights: Mapping[str, np.ndarray]) -> dict[float, float]:
    """The error of every alpha."""
    seen = observed["a"]
    inputs = seen.fitted_amax if scheme.inputs is not None else np.abs(seen.rows).mean(0)
    widest = np.max([np.abs(weight).max(1) for weight in weights.values()], axis=0)
    return {alpha: plain_error(scheme, observed, weights, smoothing_scales(inputs, widest, alpha)) for alpha in ALPHAS}


@pytest.mark.parametrize("name", SMOOTHED)
def test_blocks_find_what_the_formula_finds(name: SchemeName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing_search, "CACHED", 7 * 256)
    observed, weights = outliers(96, 1)
    errors = tried(SCHEMES[name], observed, weights)
    chosen = best_smoothing(GROUP, SCHEMES[name], observed, weights)
    assert chosen is not None
    assert chosen[0] == min(errors, key=lambda alpha: errors[alpha])
    again = best_smoothing(GROUP, SCHEMES[name], observed, weights)
    assert again is not None
    assert np.array_equal(chosen[1], again[1])


@pytest.mark.parametrize("name", SMOOTHED)
def test_a_part_of_the_columns_decides_as_all_do(name: SchemeName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing_search, "COLUMNS", 96)
    for seed in range(4):
        observed, weights = outliers(768, seed)
        errors = tried(SCHEMES[name], observed, weights)
        chosen = best_smoothing(GROUP, SCHEMES[name], observed, weights)
        assert chosen is not None
        assert errors[chosen[0]] <= 1.01 * min(errors.values())


def test_inputs_that_are_all_zero_need_no_smoothing() -> None:
    observed, weights = outliers(16, 0)
    seen = observed["a"]
    zero = Observed(rows=0 * seen.rows, fitted_amax=0 * seen.fitted_amax, amax=0 * seen.amax)
    assert best_smoothing(GROUP, SCHEMES["int8-smooth"], dict.fromkeys("ab", zero), weights) is None
