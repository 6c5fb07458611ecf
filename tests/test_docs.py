"""Do the documents say what is there: links, paths, keys, messages, configurations, code, and the generated page?"""

import ast
import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kdjax.config import from_dict, load_config, reference

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
ROOMS = ("kdjax", "bridge", "examples", "configs", "tests", "benchmarks", "docs", "requirements")
KEYS = {name for name, *_ in reference()}
GROUPS = {name.partition(".")[0] for name in KEYS if "." in name}
BASE = {"student": {"path": "student"}, "data": {"train": [{"path": "rows.jsonl"}]}}
# where a newcomer begins to type
START = [page for page in PAGES if page.stem in ("README", "quickstart", "index", "own", "on_policy")]

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
    """within the repository; what lies on the web is not asked for, so that no test needs a network"""
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


@pytest.mark.parametrize("page", START, ids=lambda page: page.name)
def test_commands_find_what_make_installed(page):
    before, python, _ = "\n".join(text for _, text in blocks(page, "bash")).partition("python -m kdjax")
    assert python and "source .venv/bin/activate" in before


def quickstart_runs(file: Path) -> list[str]:
    """what starts training with the quickstart's configuration: in a page's text, a docstring or a comment"""
    text = re.sub(r" \\\n\s*", " ", file.read_text())
    starts = r"(?:kdjax\.train --config |hand_written_loop\.py |load_config\(\")configs/quickstart\.yaml[^`\n]*"
    return re.findall(starts, text)


def test_no_command_but_makes_own_writes_into_the_quickstarts_folder():
    """one that does is refused, or takes the report and the export that the quickstart left there"""
    files = [*PAGES, *ROOT.glob("examples/*.py"), *ROOT.glob("configs/**/*.yaml"), *ROOT.glob("configs/**/*.md")]
    runs = [(file.name, run) for file in files for run in quickstart_runs(file)]
    assert {"README.md", "quickstart.md", "configuration.md", "hand_written_loop.py"} <= {name for name, _ in runs}
    assert [run for run in runs if not re.search(r"[ \"]output=runs/(?!quickstart\b)\w", run[1])] == []


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


def test_the_algorithm_for_rollouts_is_the_examples():
    def arithmetic(text):
        (found,) = (n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "KindValues")
        return [ast.unparse(n) for n in found.body if not (isinstance(n, ast.Expr) and ast.get_docstring(found))]

    (shown,) = (text for _, text in blocks(ROOT / "docs" / "algorithms.md", "python") if "KindValues" in text)
    assert arithmetic(shown) == arithmetic((ROOT / "examples" / "own_rollout_algorithm.py").read_text())


def test_committed_configurations_parse():
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(file)


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").exists() and (tmp_path / "site" / "way.svg").exists()


def pins(file: Path) -> dict[str, str]:
    """name → version of every ``name==version``"""
    lines = [line.split("==") for line in file.read_text().splitlines() if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in lines}


def test_what_a_gpu_gets_is_pinned_and_its_pins_fit():
    constraints, text = ROOT / "requirements" / "gpu-constraints.txt", (ROOT / "docker" / "Dockerfile").read_text()
    assert re.search(r"^FROM nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu[\d.]+$", text, flags=re.M)
    installs = re.findall(r"pip install (.*)", text)
    assert len(installs) == 2 and all(line.startswith("-c /opt/constraints.txt ") for line in installs)
    pinned = pins(constraints)
    assert all("==" in line or line.startswith("#") for line in constraints.read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    wanted = [*project["dependencies"], *extras, *requires("sglang")]
    node = {"extra": "", "sys_platform": "linux", "platform_machine": "x86_64"}
    nodes = [node | {"python_version": version} for version in ("3.11", "3.12", "3.13")]
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or any(map(requirement.marker.evaluate, nodes)):
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    tested = {}
    for file in (ROOT / "requirements").glob("cpu*.txt"):
        tested |= pins(file)
    # Builds for a CPU are others: SGLang names the versions for a GPU itself; what it asks for there holds numpy back.
    others = {name for name in pinned.keys() & tested if pinned[name] != tested[name]}
    assert others == {"torch", "torchvision", "triton", "numpy"}


def test_every_requirement_has_an_upper_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(n for e in extras for n in e),
    ]
    for requirement in map(Requirement, wanted):
        assert {"<", "=="} & {one.operator for one in requirement.specifier}, requirement
    for file in (ROOT / "requirements").glob("*.txt"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith(("#", "--extra-index-url "))]
        assert lines and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), file


def test_the_image_gets_nothing_that_git_ignores():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"**/{name}" for name in ignored} | {".git"} <= set(left_out)


def test_the_navigation_holds_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def files(entry):
        return [entry] if isinstance(entry, str) else [f for v in entry.values() for f in files_of(v)]

    def files_of(value):
        return [value] if isinstance(value, str) else [f for item in value for f in files(item)]

    assert sorted(files_of(nav)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


KDFLOW = """
student_name_or_path teacher_name_or_path attn_implementation use_liger_kernel lora_rank lora_alpha target_modules
lora_dropout ring_attn_size enable_thinking disable_fast_tokenizer num_nodes num_gpus_per_node num_epochs
train_batch_size micro_train_batch_size learning_rate lr_scheduler lr_warmup_ratio min_lr max_norm weight_decay
adam_betas backend gradient_checkpointing enable_sleep eval_steps save_steps save_path ckpt_path seed bf16
use_dynamic_bsz max_token_len_per_gpu fsdp_size cpu_offload kd_ratio kd_temperature kd_algorithm kd_loss_fn
teacher_tp_size teacher_ep_size teacher_pp_size teacher_dp_size teacher_forward_n_batches teacher_mem_fraction_static
teacher_offload_tags teacher_quantization dskd_token_align dskd_topk_vocab dskd_projector_lr jsd_beta skew_lambda
adaptive_alpha hrl_topk teacher_update_freq use_ema_teacher teacher_ema_decay multi_teacher_config rollout_num_engines
rollout_tp_size rollout_batch_size n_samples_per_prompt generate_max_len temperature top_p rollout_mem_fraction_static
print_rollout_sample train_dataset_path train_dataset_probs train_split eval_dataset_path eval_split input_key
output_key image_key teacher_input_key label_key apply_chat_template max_len prompt_max_len max_samples
packing_samples preprocess_num_workers logging_steps use_wandb wandb_org wandb_project wandb_group wandb_run_name
wandb_mode wandb_dir max_ckpt_num save_training_state resume_training resume_from custom_eval_fn
""".split()
WITHOUT_COUNTERPART = {"backend", "use_liger_kernel", "attn_implementation"}


def test_every_argument_of_kdflow_has_a_row():
    lines = (ROOT / "docs" / "kdflow.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    found = {name: cells[1] for cells in rows for name in re.findall(r"`(\w+)`", cells[0])}
    assert set(KDFLOW) <= set(found)
    for name in KDFLOW:
        counterpart = found[name]
        assert counterpart and (name in WITHOUT_COUNTERPART or "no counterpart" not in counterpart), name
        keys = {text.partition(":")[0] for text in re.findall(r"`([^`]+)`", counterpart)} & KEYS
        assert keys or "*planned*" in counterpart or "no counterpart" in counterpart, name


def texts(file: Path) -> list[str]:
    """every string in a Python file but docstrings, as far as it is written there: what is put into one is …"""
    found = []
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Name("docstring")
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_message_in_troubleshooting_is_one_that_is_given():
    """in the code, or, where its words come from several places, in a test that expects it"""
    files = (file for room in ("kdjax", "bridge", "tests") for file in (ROOT / room).rglob("*.py"))
    given = "\n".join(text for file in files if file != Path(__file__) for text in texts(file))
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.M)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 100
    parts = {message: [part.strip(" :;,()") for part in message.split("…")] for message in messages}
    assert [(message, part) for message, each in parts.items() for part in each if part not in given] == []
