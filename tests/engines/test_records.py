"""Records: every dataclass survives the way to JSON and back, and whatever else is there is refused by its place."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from qie.engines.records import from_plain, to_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    name: str
    kind: Literal["a", "b", 3]
    size: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    count: int
    sure: bool
    leaves: tuple[Leaf, ...]
    pair: tuple[int, str]
    dims: tuple[int | str, ...]
    table: dict[str, Leaf]
    maybe: Leaf | None
    text: str | None = None
    more: tuple[int, ...] = field(default_factory=tuple)


LEAF = Leaf(name="x", kind="a", size=1.5)
TREE = Tree(
    count=3,
    sure=True,
    leaves=(LEAF, Leaf(name="y", kind=3, size=2.0)),
    pair=(1, "one"),
    dims=(1, "batch", 64),
    table={"left": LEAF},
    maybe=None,
    text="words",
)


def plain() -> Any:
    return json.loads(json.dumps(to_plain(TREE)))


def test_there_and_back() -> None:
    assert from_plain(Tree, plain()) == TREE
    assert from_plain(Tree, {**plain(), "maybe": plain()["leaves"][0]}).maybe == LEAF


def test_plain_data_is_what_json_knows() -> None:
    assert plain() == to_plain(TREE)
    assert to_plain(TREE)["leaves"][1] == {"name": "y", "kind": 3, "size": 2.0}


def test_defaults_may_be_absent() -> None:
    data = plain()
    del data["text"], data["more"]
    found = from_plain(Tree, data)
    assert found.text is None
    assert found.more == ()


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    found = from_plain(Leaf, {"name": "x", "kind": "a", "size": 2})
    assert type(found.size) is float


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("count",), "3", "count is '3', expected a whole number"),
        (("count",), 3.0, "count is 3.0, expected a whole number"),
        (("count",), True, "count is True, expected a whole number"),
        (("count",), None, "count is None, expected a whole number"),
        (("sure",), 1, "sure is 1, expected a bool"),
        (("leaves",), {}, "leaves is {}, expected a list"),
        (("leaves", 1), "y", r"leaves[1] is 'y', expected an object"),
        (("leaves", 1, "size"), True, r"leaves[1].size is True, expected a number"),
        (("leaves", 1, "size"), "2", r"leaves[1].size is '2', expected a number"),
        (("leaves", 0, "kind"), "c", r"leaves[0].kind is 'c', expected 'a' or 'b' or 3"),
        (("leaves", 0, "kind"), ["a"], r"leaves[0].kind is ['a'], expected 'a' or 'b' or 3"),
        (("leaves", 0, "color"), "red", r"leaves[0]: unknown key 'color'"),
        (("color",), "red", "unknown key 'color'"),
        (("pair",), [1], "pair is [1], expected a list of 2"),
        (("pair", 1), 1, "pair[1] is 1, expected a str"),
        (("dims", 1), 1.5, "dims[1] is 1.5, expected a whole number"),
        (("table",), [], "table is [], expected an object"),
        (("table", "left", "name"), 1, "table.left.name is 1, expected a str"),
        (("maybe",), 1, "maybe is 1, expected an object"),
        (("text",), 1, "text is 1, expected a str"),
        (("count",), "x" * 100, "count is '" + "x" * 56 + "…, expected a whole number"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(path: tuple[str | int, ...], value: Any, said: str) -> None:
    data = plain()
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        from_plain(Tree, data)


@pytest.mark.parametrize("key", ["count", "leaves", "maybe"])
def test_a_missing_key(key: str) -> None:
    data = plain()
    del data[key]
    with pytest.raises(ValueError, match=f"^missing key '{key}'$"):
        from_plain(Tree, data)


def test_a_missing_key_inside() -> None:
    data = plain()
    del data["leaves"][1]["name"]
    with pytest.raises(ValueError, match=r"^leaves\[1\]: missing key 'name'$"):
        from_plain(Tree, data)


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_no_object_at_all(data: Any) -> None:
    with pytest.raises(ValueError, match="expected an object"):
        from_plain(Tree, data)
