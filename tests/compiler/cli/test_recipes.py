"""``qie recipes``."""

import json
import re
from pathlib import Path

from tests.support.command_line import Qie


def test_recipes(qie: Qie) -> None:
    text = qie("recipes").stdout
    rows = json.loads(qie("recipes", "--json").stdout)["recipes"]
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    for row in rows:
        assert re.search(rf"^{row['name']} +{re.escape(row['gpu'])}", text, re.MULTILINE)
        assert set(row) == {"name", "gpu", "compute_capability", "memory_gib", "backends", "transformer"}


def test_a_shown_recipe_is_a_recipe(qie: Qie, workplace: Path, checkpoint: Path) -> None:
    Path("shown.toml").write_text(qie("recipes", "show", "cpu").stdout)
    done = qie("build", checkpoint, "--gpu", "shown.toml", "--dry-run", "--json")
    assert json.loads(done.stdout)["recipe"] == "shown.toml"
