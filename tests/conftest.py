"""Eight fake CPU devices and a compilation cache shared by all tests, set before anything imports jax."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Compiling is most of the suite and takes a quarter as long like this; child processes inherit it. The tests that
# prove numbers, memory and communication ask for `optimized`; `make test-full` compiles everything as runs do.
FLAGS = ["--xla_force_host_platform_device_count=8"]
# JAX 0.11 ends a process that names this flag.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0" and version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import yaml  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# The files that take longest: begun last, one would keep one of two workers busy alone at the end.
LONGEST = [f"test_{name}.py" for name in ("resume", "train", "step", "on_policy", "self_teacher", "interrupt",
           "linear_divergence", "not_finite", "survive_engine", "survive_rollouts", "engines", "recipes")]  # fmt: skip
assert all((ROOT / "tests" / name).exists() for name in LONGEST), "a file of LONGEST has another name now"


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="module")
def optimized():
    """XLA's usual optimizations, fusion emitters apart, for files that are about what they make of the program.

    Programs are forgotten before and after: JAX would use one that was compiled with the other setting.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def unchecked():
    """No call is checked against its annotations: for what kdjax itself says of a wrong one, or stand-ins."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


GSM8K = {"format": "prompt_response", "prompt_key": "question", "response_key": "answer"}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_teacher(root, tmp_path_factory):
    """A random Qwen3 with the examples' tokenizer: enough to be followed."""
    from kdjax.models import export_hf, load_model

    shape = yaml.safe_load((root / "configs" / "quickstart_teacher.yaml").read_text())["student"]["config"]
    shape |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 24, "initializer_range": 0.2}  # fmt: skip
    folder = tmp_path_factory.mktemp("teacher") / "model"
    export_hf(load_model(None, config=shape, init="random", seed=9), folder, tokenizer=root / "examples" / "tokenizer")
    return folder


@pytest.fixture
def run_values(root, tiny_teacher, tmp_path):
    """A small distillation of tiny_teacher on GSM8K, as plain values of a configuration."""
    data = root / "examples" / "data"
    return {
        "output": str(tmp_path / "run"),
        "student": {"path": str(tiny_teacher), "init": "random", "config": dict(SMALL)},
        "teacher": {"path": str(tiny_teacher), "engine": "transformers"},
        "data": {
            "train": [{"path": str(data / "gsm8k_train.jsonl"), "max_samples": 200} | GSM8K],
            "eval": [{"path": str(data / "gsm8k_test.jsonl")} | GSM8K],
            "max_len": 256,
            "packing_bins": 8,
        },
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 3e-3, "eval_rows": 8, "eval_every": 3},
        "mesh": {"data": 1},
        "checkpoint": {"check_export": False},
        "log": {"every": 1, "tensorboard": False, "report": False},
    }


@pytest.fixture
def sharded_values(run_values):
    """The same for runs on several devices: its layers one by one, not in a loop.

    A collective in a loop and one outside that do not wait for each other come in either order on XLA's CPU devices
    (jaxlib 0.10.2), now and then not in the same on all, and then these wait for each other for ever.
    """
    run_values["student"]["scan_layers"] = False
    return run_values


@pytest.fixture
def devices_as_asked(monkeypatch):
    """A run takes every device there is; with this it takes as many as its mesh asks for."""
    from kdjax.sharding import make_mesh

    def fitting(data, fsdp, tensor):
        return make_mesh(data, fsdp, tensor, devices=jax.devices()[: max(1, data * fsdp * tensor)])

    monkeypatch.setattr("kdjax.training.sources.make_mesh", fitting)


@pytest.fixture
def temporary(monkeypatch):
    """An empty folder that engines make their temporary files in; its path is short, as sockets want it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="kdjax-test-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def local_engines(monkeypatch):
    """Runs start engines in this process; the list holds them in the order in which they started."""
    from local_engine import LocalEngine

    started = []

    def start(model, key, **options):
        started.append(LocalEngine(model, **options))
        return started[-1]

    for module in ("training.teacher", "rollouts.engines"):
        monkeypatch.setattr(f"kdjax.{module}.started", start)
    return started


@pytest.fixture
def on_policy_values(run_values):
    """A run of six steps in which a small random student answers GSM8K, as plain values of a configuration."""
    run_values["distill"] = {"loss": "rkl", "kd_ratio": 1.0, "on_policy_fraction": 1.0}
    run_values["rollout"] = {"engine": "transformers", "max_new_tokens": 8}
    run_values["train"] |= {"eval_every": None, "eval_rows": None}
    run_values["data"].pop("eval")
    return run_values
