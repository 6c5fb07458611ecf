"""Do the borders hold? kdjax never sees torch or sglang, bridge never sees kdjax, SGLang's processes never see jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_JAX = {"jax", "jaxlib", "flax", "kdjax"}
# What the engine's processes load, SGLang's own children included.
SERVER_SIDE = (
    "server", "host", "leaving", "pool_rows", "bucket_tensors", "sglang_engine", "sglang_hook", "sglang_platform",
    "sglang_weights", "torchvision_hook", "transformers_engine",
)  # fmt: skip
# What kdjax may load of bridge.
TRAINER_SIDE = ("client", "engine", "hidden_pool", "dlpack", "cuda", "errors", "checkpoint", "segments", "weight_sync")
# Rooms of kdjax and what they know nothing of.
APART = {
    "models": ("kdjax.losses", "kdjax.engines", "bridge"),
    "losses": ("kdjax.models", "kdjax.engines", "bridge"),
}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """the modules a file imports, relative ones spelt out; with `top_level_only` those in functions left out"""
    tree = ast.parse(path.read_text(), str(path))
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in _outside_functions(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return names


def _outside_functions(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _outside_functions(child)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return name.split(".")[0] in packages


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources("kdjax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kdjax_imports_neither_torch_nor_sglang(path):
    names = imported(path)
    assert not {name for name in names if within(name, ("torch", "sglang"))}
    allowed = {f"bridge.{name}" for name in TRAINER_SIDE}
    used = {name for name in names if name.startswith("bridge.")}
    assert {name for name in used if not any(name == ok or name.startswith(f"{ok}.") for ok in allowed)} == set()


@pytest.mark.parametrize("room", APART)
def test_rooms_know_nothing_of_each_other(room):
    files = sources(f"kdjax/{room}")
    used = {(path.name, name) for path in files for name in imported(path)}
    assert files
    assert not {(file, name) for file, name in used for other in APART[room] if f"{name}.".startswith(f"{other}.")}


@pytest.mark.parametrize("path", sources("bridge"), ids=lambda path: str(path.relative_to(ROOT)))
def test_bridge_imports_neither_kdjax_nor_jax(path):
    assert not {name for name in imported(path) if within(name, ("kdjax", "jax", "jaxlib", "flax"))}


@pytest.mark.parametrize("module", TRAINER_SIDE)
def test_the_trainers_side_of_bridge_loads_no_framework_by_itself(module):
    names = imported(ROOT / "bridge" / f"{module}.py", top_level_only=True)
    assert not {name for name in names if within(name, ("torch", "sglang", "transformers", "jax"))}


def test_every_module_of_bridge_is_on_one_side():
    assert {path.stem for path in sources("bridge")} == {*SERVER_SIDE, *TRAINER_SIDE, "__init__"}
    assert (ROOT / "bridge" / "__init__.py").read_text() == ""


def loaded(statement: str) -> set[str]:
    """top-level packages in `sys.modules` of a fresh process after `statement`"""
    script = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_fresh_kdjax_has_no_torch():
    """every module of it, in one process"""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("kdjax")]
    modules = loaded("\n".join(f"import {name.removesuffix('.__init__')}" for name in names))
    assert "jax" in modules and not modules & {"torch", "sglang"}


def test_a_fresh_kdjax_loads_nothing_for_show():
    assert not loaded("import kdjax, kdjax.training.metrics, kdjax.report") & {"matplotlib", "wandb", "tensorboardX"}


def test_a_fresh_trainers_side_has_no_framework():
    modules = loaded("; ".join(f"import bridge.{name}" for name in TRAINER_SIDE))
    assert not modules & {"torch", "sglang", "transformers", "jax", "kdjax"}


def test_a_fresh_server_has_no_jax():
    assert not loaded("import bridge.server") & NO_JAX


def test_sglang_beside_a_cpu_torch_has_no_jax():
    """in the order in which a server loads it: the mended torchvision, SGLang, our plugin"""
    modules = loaded(
        "import bridge.server\n"
        "import sglang.srt.entrypoints.engine, sglang.srt.managers.scheduler, torchvision\n"
        "import bridge.sglang_engine, bridge.sglang_hook, bridge.transformers_engine, torch\n"
        "from sglang.srt.platforms import current_platform\n"
        "assert current_platform.is_out_of_tree() != torch.cuda.is_available()"
    )
    assert {"sglang", "torchvision"} <= modules and not modules & NO_JAX
