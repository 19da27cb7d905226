"""`vitrail init`: list the recipes and write one as the start of your own config."""

import difflib
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.terminal import report_errors
from pretrain.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"  # a link to configs/, and a folder in the wheel
STAGES = ("pretrain", "finetune")


def init(
    recipe: Annotated[
        str | None, typer.Argument(show_default="list the recipes", help="Name of a recipe, such as photos_mae_ti16.")
    ] = None,
    file: Annotated[
        Path | None, typer.Argument(show_default="RECIPE.yaml", help="Config file to write; it must not exist yet.")
    ] = None,
) -> None:
    """List the recipes, or write one to a file as the start of your own config.

    The recipes that begin with photos_ are for small folders of photos; the others are published ones for large
    datasets. The head of each file states its command, the number of images and epochs, and what was measured.

    Example: vitrail init

    Example: vitrail init photos_mae_ti16 my.yaml
    """
    with report_errors():
        if recipe is None:
            list_recipes()
        else:
            write_recipe(recipe, file or Path(f"{recipe}.yaml"))


def find_recipes() -> dict[str, Path]:
    """Return the file of each recipe by name."""
    return {path.stem: path for stage in STAGES for path in sorted((RECIPES / stage).glob("*.yaml"))}


def list_recipes() -> None:
    """Print the name and the first sentence of each recipe."""
    recipes = find_recipes()
    width = max(map(len, recipes)) + 2
    for stage in STAGES:
        print(f"recipes for vitrail {stage}:")
        for name, path in recipes.items():
            if path.parent.name == stage:
                print(f"  {name:<{width}}{first_sentence(path)}")
    print("write one with: vitrail init RECIPE FILE")


def first_sentence(recipe: Path) -> str:
    """Return the first sentence of the comment at the head of a recipe."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    head = " ".join(line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line == "#")])
    return head.partition(". ")[0].rstrip(".")


def write_recipe(name: str, file: Path) -> None:
    """Write a recipe to a file, in whose head the command names that file.

    Raises:
        UserError: If there is no such recipe, or the file exists.
    """
    recipes = find_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1, cutoff=0.4)
        fix = f"did you mean {near[0]}?" if near else "`vitrail init` lists all"
        raise UserError(f"{name}: no such recipe; {fix}")
    if file.is_dir():
        file /= f"{name}.yaml"
    path = recipes[name]
    text = path.read_text(encoding="utf-8").replace(f"configs/{path.parent.name}/{path.name}", str(file))
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UserError(f"{file}: already exists; choose another file name") from None
    print(f"{file}: written; set its paths, then run: vitrail {path.parent.name} {file}")
