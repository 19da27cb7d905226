"""The generated pages of the documentation are up to date."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
GENERATE = runpy.run_path(str(DOCS / "generate.py"))


@pytest.mark.parametrize("name", GENERATE["PAGES"])
def test_generated_page_is_up_to_date(name: str) -> None:
    expected = f"{GENERATE['NOTICE']}\n\n{GENERATE['PAGES'][name]()}"
    assert (DOCS / name).read_text(encoding="utf-8") == expected, f"docs/{name}: run `python docs/generate.py`"


def test_commands_page_has_every_verb_and_the_names_of_its_options() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    for verb in ("shards make", "shards check", "export", "predict", "checkpoints prune", "supervise"):
        assert f"## `vitrail {verb}`" in page
    for name in ("--json", "--as", "--top-k", "--print-config", "--version", "COMMAND..."):
        assert f"| `{name}` |" in page
    assert "| `--seed` | whole number | `0` |" in page
    assert "| `--workers` | whole number ≥ 1 | number of CPU cores |" in page


def test_config_page_has_every_key_of_both_stages() -> None:
    page = (DOCS / "config.md").read_text(encoding="utf-8")
    for key in ("`optimizer.learning_rate`", "`objective.mask_ratio`", "`objective.augment.mixup`", "`model`"):
        assert f"| {key} |" in page
    assert "| `data.cache_dir` | path | `~/.cache/vitrail` |" in page
