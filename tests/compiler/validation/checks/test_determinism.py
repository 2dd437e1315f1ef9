"""Equal requests give equal bytes, and a bundle whose results depend on anything else fails."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.compiler.validation import edits
from qie.compiler.validation.golden.file import Golden
from qie.compiler.validation.subject import Subject
from qie.engines.editing.stages import Stages
from qie.engines.errors import RequestError
from tests.support.bundles import build
from tests.support.subjects import ON, checked, only, opened, reasons, using

NAMES = ["repeats", "batches", "threads"]

IN_BATCHES = """\
extends = "cpu"
[shapes]
batch = { max = 4 }
"""


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory, golden: Golden) -> Iterator[Subject]:
    """The pocket model with results in batches of four."""
    with opened(build("pocket", tmp_path_factory.mktemp("batched") / "pocket", IN_BATCHES).path, golden) as subject:
        yield subject


@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("repeats", "the same request twice, and after an edit of 128x128 pixels"),
        ("batches", "3 seeds in one request, in batches of 3, and one by one"),
        ("threads", "the same request on 1, 2, 3 threads"),
    ],
)
def test_a_sound_bundle_gives_equal_bytes(batched: Subject, name: str, tried: str) -> None:
    (check,) = checked(batched, name)
    assert (check.result, check.value, check.case, check.on) == ("passed", 0, None, ON)
    assert check.detail == f"equal bytes: {tried}"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8", "int8-smooth"])
def test_quantized_results_do_not_depend_on_what_runs_beside_them(tmp_path: Path, golden: Golden, scheme: str) -> None:
    recipe = f'{IN_BATCHES}[components]\ntransformer = {{ precision = "float32", scheme = "{scheme}" }}\n'
    bundle = build("pocket", tmp_path / "pocket", recipe, calibration=golden.path.with_name("calibration.npz"))
    with opened(bundle.path, golden) as subject:
        assert [check.result for name in NAMES[:2] for check in checked(subject, name)] == ["passed"] * 2


def test_results_that_vary_fail(batched: Subject, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every edit drew its own noise."""
    draws = np.random.default_rng(0)
    whole = edits.edit

    def restless(stages: Any, tokenizer: Any, request: Any, **options: Any) -> Any:
        seeds = draws.integers(1 << 30, size=len(request.seeds)).tolist()
        return whole(stages, tokenizer, replace(request, seeds=seeds), **options)

    monkeypatch.setattr(edits, "edit", restless)
    subject = using(batched, only(golden, "wide"))
    found = {name: checked(subject, name)[0] for name in NAMES}
    assert {name: (check.result, check.value) for name, check in found.items()} == {
        "repeats": ("failed", 2),
        "batches": ("failed", 3),
        "threads": ("failed", 2),
    }
    assert found["repeats"].detail == "the same request again gives other bytes (and 1 more)"
    assert found["batches"].detail == "seed 1 gives other bytes among 3 than alone (and 2 more)"
    assert found["threads"].detail == "2 threads give other bytes than 1 (and 1 more)"


def test_encoders_that_vary_fail(sound: Subject, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edit of a check runs every engine: no embeddings of the one before are taken."""
    vision, runs = Stages.vision, count()

    def restless(stages: Stages, inputs: Any, **options: Any) -> Any:
        return vision(stages, inputs, **options) + np.float32(next(runs))

    monkeypatch.setattr(Stages, "vision", restless)
    (check,) = checked(using(sound, only(golden, "wide")), "repeats")
    assert (check.result, check.value) == ("failed", 2)


def test_engines_of_one_image_a_run_have_no_batches(sound: Subject) -> None:
    assert reasons(sound, "batches") == ["the engines take one image a run"]


def test_what_an_edit_of_another_size_leaves_behind_fails(
    sound: Subject, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a buffer kept its size."""
    decode, sizes = Stages.decode, set()

    def stale(stages: Stages, latents: Any, **options: Any) -> Any:
        sizes.add(latents[0].shape)
        return [image + np.uint8(len(sizes) > 1) for image in decode(stages, latents, **options)]

    monkeypatch.setattr(Stages, "decode", stale)
    (check,) = checked(using(sound, only(golden, "wide")), "repeats")
    assert (check.result, check.value) == ("failed", 1)
    assert check.detail == "the same request gives other bytes after an edit of 128x128 pixels"


def test_threads_of_a_gpu_are_not_compared(sound: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sound.executed is not None
    stages = sound.executed.stages
    engines = {name: (replace(engine, compute_capability="8.9"),) for name, (engine,) in stages.engines.items()}
    monkeypatch.setattr(stages, "engines", engines)
    assert checked(sound, "threads") == []


def test_bytes_of_other_engines_are_not_compared(sound: Subject) -> None:
    assert sound.executed is not None
    for name in NAMES:
        (check,) = checked(replace(sound, executed=replace(sound.executed, rebuilt=True)), name)
        assert check.result == "not run"
        assert check.detail.startswith("graphs run here in place of the engines, whose bytes are meant; run it on the")


@pytest.mark.parametrize("name", ["repeats", "threads"])
def test_nothing_runs_without_a_golden_file_or_engines_or_a_case(sound: Subject, golden: Golden, name: str) -> None:
    (check,) = checked(using(sound, None), name)
    assert (check.result, check.detail) == ("not run", "no golden file; record one")
    (check,) = checked(replace(sound, executed=None, not_executed="no GPU; run it elsewhere"), name)
    assert (check.result, check.detail) == ("not run", "no GPU; run it elsewhere")
    (check,) = checked(using(sound, only(golden, "wide", guidance=1e9)), name)
    assert check.result == "not run"
    assert check.detail.startswith("the bundle does not take this case: the guidance scale is ")


def test_threads_are_none_or_more(sound: Subject) -> None:
    with pytest.raises(RequestError, match="-1 threads were requested; give 0 for one per core, or more"):
        Stages(sound.bundle, threads=-1)
