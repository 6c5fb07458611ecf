"""Do the documents say what is there: links, paths, keys, configurations, code, and the generated page?"""

import ast
import importlib
import re
import runpy
from pathlib import Path

import pytest
import yaml

from kdjax.config import from_dict, load_config, reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
ROOMS = ("kdjax", "bridge", "examples", "configs", "tests", "benchmarks", "docs", "requirements")
KEYS = {name for name, *_ in reference()}
GROUPS = {name.partition(".")[0] for name in KEYS if "." in name}
BASE = {"student": {"path": "student"}, "data": {"train": [{"path": "rows.jsonl"}]}}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(the line before the fence, the block dedented) of every block in ``language``"""
    lines, found, at = page.read_text().splitlines(), [], 0
    while at < len(lines):
        if fence := re.match(r"( *)```(\w*)", lines[at]):
            indent, end = len(fence[1]), at + 1
            while lines[end].strip() != "```":
                end += 1
            if fence[2] == language:
                found.append((lines[at - 1].strip(), "\n".join(line[indent:] for line in lines[at + 1 : end])))
            at = end
        at += 1
    return found


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def merged(base, part):
    if not (isinstance(base, dict) and isinstance(part, dict)):
        return part
    return base | {key: merged(base.get(key), value) for key, value in part.items()}


def test_the_configuration_page_is_what_the_generator_makes():
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, "run: python -m docs.generate"
    for name in KEYS:
        assert f"`{name}`" in made


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            assert heading in {anchor(h) for h in re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)}, target


@pages
def test_paths_in_the_text_exist(page):
    for text in re.findall(r"`([^`\n]+)`", prose(page)):
        path = text.partition(":")[0]
        if re.fullmatch(r"[\w./-]+", path) and "/" in path and path.split("/")[0] in ROOMS:
            assert (ROOT / path).exists(), path


@pages
def test_keys_in_the_text_exist(page):
    for text in re.findall(r"`([a-z_.\[\]]+)(?:[:=][^`\n]*)?`", prose(page)):
        if text.partition(".")[0] in GROUPS and "." in text:
            assert text in KEYS, text


@pages
def test_commands_name_keys_that_exist(page):
    for _, text in blocks(page, "bash"):
        for line in text.splitlines():
            command = line.partition("  #")[0]
            for key in re.findall(r"\s\"?([a-z][\w.]*\.[\w.]+)=", command):
                assert re.sub(r"\.\d+\.", "[].", key) in KEYS, line


@pages
def test_configurations_parse(page):
    for before, text in blocks(page, "yaml"):
        values = yaml.safe_load(text)
        if page.name == "README.md" or before == "<!-- config -->":
            from_dict(values)
        else:
            assert before == "<!-- config part -->", f"say which it is before this block: {text}"
            from_dict(merged(BASE, values))


@pages
def test_code_compiles_and_imports_what_is_there(page):
    for _, text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("kdjax", "bridge"):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kdjax":
                assert hasattr(importlib.import_module("kdjax"), node.attr), node.attr


def test_committed_configurations_parse():
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(file)


def test_the_navigation_holds_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def files(entry):
        return [entry] if isinstance(entry, str) else [f for v in entry.values() for f in files_of(v)]

    def files_of(value):
        return [value] if isinstance(value, str) else [f for item in value for f in files(item)]

    assert sorted(files_of(nav)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
