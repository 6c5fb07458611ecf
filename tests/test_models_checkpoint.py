"""Do weights survive Hugging Face → kdjax → Hugging Face to the bit, and is a misfit refused by name?"""

import errno
import json
import shutil
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from models_reference import bits, logits, reference, save
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

from kdjax.errors import UserError
from kdjax.models import (
    abstract_model,
    export as export_module,
    export_hf,
    hf_tensors,
    init_model,
    load_model,
    teacher_head,
)

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model by family and dtype, made once; tests that change the folder take a copy."""
    made = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in made:
            model = reference(name, dtype=dtype)
            made[name, dtype] = model, save(model, tmp_path_factory.mktemp(name))
        return made[name, dtype]

    return get


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a small untied Qwen3 that a test may damage."""
    return shutil.copytree(saved("qwen3")[1], tmp_path / "model")


def edit(folder, change, metadata=None):
    """Rewrite the folder's tensors after ``change`` (in place on the dict of name → array)."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# There and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "qwen3", "qwen3-tied"])
def test_round_trip_is_exact(saved, tmp_path, name, dtype):
    theirs, folder = saved(name, getattr(torch, dtype))
    export_hf(load_model(folder, dtype=dtype), tmp_path / "out", source=folder)
    before, after = load_torch(folder / "model.safetensors"), load_torch(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and ("lm_head.weight" in after) == (not theirs.config.tie_word_embeddings)
    for key, value in before.items():
        assert after[key].dtype == value.dtype == getattr(torch, dtype) and after[key].shape == value.shape
        assert np.array_equal(bits(after[key]), bits(value)), key
    one, two = (AutoModelForCausalLM.from_pretrained(f, dtype=theirs.dtype) for f in (folder, tmp_path / "out"))
    assert np.array_equal(logits(one, TOKENS), logits(two, TOKENS))


def test_masters_hold_what_the_file_holds(saved):
    theirs, folder = saved("qwen3", torch.bfloat16)
    model = load_model(folder, dtype="bfloat16", param_dtype="float32")
    for key, value in hf_tensors(model):
        assert value.dtype == np.float32
        assert np.array_equal(value, theirs.state_dict()[key].float().numpy()), key
    for key, value in hf_tensors(model, dtype="bfloat16"):
        assert np.array_equal(bits(np.asarray(value)), bits(theirs.state_dict()[key])), key


def test_sharded_files_there_and_back(saved, tmp_path):
    theirs, folder = saved("qwen2")
    many = save(theirs, tmp_path / "many", max_shard_size="10KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    model = load_model(many)
    out = export_hf(model, tmp_path / "out", source=many, max_shard_bytes=10_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * sum(value.numel() for value in theirs.parameters())
    again = AutoModelForCausalLM.from_pretrained(out)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_exported_folder_is_complete(saved, tmp_path):
    _, folder = saved("llama3-rope")
    source = shutil.copytree(folder, tmp_path / "source")
    edit_config(source, eos_token_id=[3, 5], bos_token_id=1)
    (source / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": [3, 5], "do_sample": true}')
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(f"the source's {name}")
    (source / "modeling_custom.py").write_text("nothing to copy")
    model = load_model(source, init=(0, 2))
    out = export_hf(model, tmp_path / "out", source=source, dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"], config["eos_token_id"]) == (2, "bfloat16", [3, 5])
    assert config["rope_parameters"]["factor"] == config["rope_scaling"]["factor"] == 8.0
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.7
    ended = json.loads((export_hf(model, out, source=source, stop_ids=[9]) / "generation_config.json").read_text())
    assert (ended["temperature"], ended["eos_token_id"]) == (0.7, [3, 5, 9])
    export_hf(model, out, source=source, dtype="bfloat16")
    assert (out / "chat_template.jinja").read_text() == "the source's chat_template.jinja"
    assert sorted(p.name for p in out.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("another")
    export_hf(model, out, source=source, tokenizer=other)
    assert (out / "tokenizer.json").read_text() == "another" and not (out / "chat_template.jinja").exists()


def test_student_of_chosen_layers(saved):
    theirs, folder = saved("qwen3")
    model = load_model(folder, init=[2, 0])
    assert model.config.num_hidden_layers == 2
    ours, state = dict(hf_tensors(model)), theirs.state_dict()
    for key, value in ours.items():
        source = (
            key.replace("layers.0.", "layers.X.").replace("layers.1.", "layers.0.").replace("layers.X.", "layers.2.")
        )
        assert np.array_equal(value, state[source].numpy()), key
    for layers, message in (((0, 3), "layer 3 is not in 0 … 2"), ((), "the list of layers is empty")):
        with pytest.raises(UserError, match=message):
            load_model(folder, init=layers)


def test_random_student_needs_no_weights(saved, tmp_path):
    _, folder = saved("qwen3")
    shutil.copy(folder / "config.json", tmp_path)
    model = load_model(tmp_path, init="random", seed=3, config=dict(num_hidden_layers=6, initializer_range=0.02))
    weight = np.asarray(model.layers.mlp.gate.weight[...])
    assert weight.shape == (6, 40, 32) and abs(weight.std() - 0.02) < 1e-3
    assert np.all(np.asarray(model.norm.weight[...]) == 1)
    same, other = init_model(model.config, seed=3), init_model(model.config, seed=4)
    assert np.array_equal(same.embed.weight[...], model.embed.weight[...])
    assert not np.array_equal(other.embed.weight[...], model.embed.weight[...])
    alone = load_model(None, init="random", seed=3, config=model.config.to_hf("float32"))
    assert np.array_equal(alone.layers.mlp.gate.weight[...], weight)
    with pytest.raises(UserError, match="without a path there are no weights to load"):
        load_model(None)


def test_abstract_model_takes_no_memory(saved):
    _, folder = saved("qwen3")
    model = load_model(folder, abstract=True)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
    big = abstract_model(
        load_model(folder, abstract=True, config=dict(hidden_size=16384, num_hidden_layers=200)).config
    )
    graph, state = nnx.split(big)
    lowered = jax.eval_shape(lambda s: nnx.merge(graph, s)(TOKENS), state)
    assert lowered.shape == (2, 9, 16384)


# Refusals


def refused(folder, message, load=load_model):
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight_scale"] = np.ones(3, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((40, 31), np.float32)

    edit(folder, change)
    refused(
        folder,
        "missing model.norm.weight; unknown model.layers.0.self_attn.q_proj.weight_scale; "
        r"misshaped: model.layers.1.mlp.up_proj.weight is \(40, 31\), expected \(40, 32\)",
    )


def test_fewer_layers_than_stored_are_unknown_tensors(folder):
    edit_config(folder, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    refused(folder, "unknown model.layers.2.*and 7 more")


def test_rotary_buffers_are_passed_over(folder):
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    load_model(folder)


def test_a_stored_copy_of_a_tied_head(saved, tmp_path):
    folder = shutil.copytree(saved("qwen3-tied")[1], tmp_path / "tied")
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    load_model(folder)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    refused(folder, "tie_word_embeddings is true, yet lm_head.weight differs from model.embed_tokens.weight")


def test_cut_off_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "model.safetensors: damaged or cut-off safetensors file")
    path.write_bytes(b"")
    refused(folder, "model.safetensors: damaged or cut-off safetensors file")


def test_files_that_contradict_the_index(saved, tmp_path):
    many = save(saved("qwen2")[0], tmp_path / "many", max_shard_size="10KB")
    index_path, files = many / "model.safetensors.index.json", sorted(many.glob("*.safetensors"))
    index = json.loads(index_path.read_text())
    names = load_file(files[1])

    save_file({**load_file(files[0]), **names}, files[0])
    refused(many, f"is stored twice, in {files[0].name} and {files[1].name}")
    save_file({k: v for k, v in load_file(files[0]).items() if k not in names}, files[0])
    load_model(many)

    moved = next(iter(names))
    index_path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], moved: files[0].name}}))
    refused(many, f"puts {moved} in {files[0].name}, but it is in {files[1].name}")
    index_path.write_text(json.dumps(index))
    files[1].rename(many / "elsewhere.bin")
    refused(many, f"{files[1].name}: no such file, though model.safetensors.index.json names it")
    index_path.unlink()
    refused(many, "safetensors files and no model.safetensors.index.json")


def test_weights_that_are_not_there(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "only pickled weights; convert them to safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no safetensors file")


def test_a_single_file_under_another_name_is_read_for_student_and_teacher(folder):
    weight = load_file(folder / "model.safetensors")["lm_head.weight"]
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert np.array_equal(load_model(folder).lm_head.weight[...], weight)
    assert np.array_equal(teacher_head(folder).weight, weight)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["lm_head.weight"]}, {"weight_map": {"lm_head.weight": 1}}])
def test_an_index_without_a_mapping_is_refused_for_student_and_teacher(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (load_model, teacher_head):
        refused(folder, "index.json: weight_map is not a mapping of tensor to file", load)


def test_files_that_nothing_chooses_from_are_refused_for_student_and_teacher(folder):
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    for load in (load_model, teacher_head):
        refused(folder, "2 safetensors files and no model.safetensors.index.json to say which belong together", load)


def test_an_index_that_is_wrong_about_the_head_is_refused_for_student_and_teacher(saved, tmp_path):
    many = save(saved("qwen2")[0], tmp_path / "many", max_shard_size="10KB")
    path = many / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    refused(many, f"index.json: puts lm_head.weight in {other}, but it is in no file")
    refused(many, f"index.json: puts lm_head.weight in {other}, which does not hold it", teacher_head)
    path.write_text(json.dumps({"weight_map": {}}))
    refused(many, "no lm_head.weight among its tensors", teacher_head)


def test_quantised_tensors(folder):
    edit(folder, lambda t: t.update({"model.norm.weight": np.ones(32, ml_dtypes.float8_e4m3fn)}))
    refused(folder, "model.norm.weight is F8_E4M3; only F32, BF16, F16 are supported")


def test_models_that_are_nowhere(tmp_path):
    refused(tmp_path / "none", "is neither a folder nor a hub id")
    refused("nobody/no-such-model", "no folder nobody/no-such-model, and the hub does not give it")


# A failing export


def test_previous_export_survives_a_failure(saved, tmp_path, monkeypatch):
    _, folder = saved("qwen3")
    model, out = load_model(folder), tmp_path / "out"
    export_hf(model, out, source=folder)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fails(model, dtype):
        yield next(hf_tensors(model, dtype))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "hf_tensors", fails)
    with pytest.raises(UserError, match="needs 0.1 MB, the disk has .* free; the earlier out is untouched"):
        export_hf(model, out, source=folder)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failed_rename_restores_the_previous_export(saved, tmp_path, monkeypatch):
    _, folder = saved("qwen3")
    model, out = load_model(folder), tmp_path / "out"
    export_hf(model, out, source=folder)
    original = type(out).rename

    def rename(self, target):
        if self.name.endswith(".tmp"):
            raise PermissionError("no")
        return original(self, target)

    monkeypatch.setattr(type(out), "rename", rename)
    with pytest.raises(PermissionError):
        export_hf(model, out, source=folder)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    load_model(out)


def test_too_small_a_disk_is_known_beforehand(saved, tmp_path, monkeypatch):
    model = load_model(saved("qwen3")[1])
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(UserError, match="needs 0.1 MB, the disk has 0.0 MB free"):
        export_hf(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_other_peoples_folders_are_left_alone(saved, tmp_path):
    model = load_model(saved("qwen3")[1])
    (tmp_path / "out" / "thesis").mkdir(parents=True)
    with pytest.raises(UserError, match="holds thesis, which is no part of an export"):
        export_hf(model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        export_hf(model, tmp_path / "file")
    with pytest.raises(UserError, match="dtype 'float8' is not one of float32, bfloat16, float16"):
        export_hf(model, tmp_path / "new", dtype="float8")
