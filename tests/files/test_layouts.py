"""Folders as the libraries themselves write them: read, averaged, and loaded again by those libraries."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from polyak import files
from polyak.errors import ConfigError, MissingFileError, StateError
from polyak.files.reading.dcp import join
from polyak.files.reading.raw import Box, RawFile
from polyak.files.reading.values import read_values

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def gpt(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=30)
    return transformers.GPT2LMHeadModel(config)


def means(models):
    states = [model.state_dict() for model in models]
    return {
        name: (sum(state[name].double() for state in states) / len(states)).to(states[0][name].dtype)
        for name in states[0]
        if states[0][name].is_floating_point()
    }


def agrees(state, models):
    for name, wanted in means(models).items():
        assert torch.equal(state[name], wanted), name


@pytest.mark.parametrize("shards", ["whole", "shards"])
def test_folders_of_the_hugging_face_trainer(shards, tmp_path):
    models = [gpt(seed) for seed in range(3)]
    for step, model in zip((500, 1000, 1500), models, strict=True):
        folder = tmp_path / f"checkpoint-{step}"
        model.save_pretrained(folder, max_shard_size="9KB" if shards == "shards" else "1GB")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({"state": {}}, folder / "optimizer.pt")
        torch.save({"cpu": torch.ones(3)}, folder / "rng_state.pth")
        (folder / "tokenizer.json").write_text(json.dumps({"of": step}))
        (folder / "modeling_own.py").write_text("x = 1\n")
    paths = sorted(tmp_path.glob("checkpoint-*"))
    made = files.average(paths, last=3, out=tmp_path / "mean", shard_size="9KB" if shards == "shards" else None)
    assert made.steps == (500, 1000, 1500)
    names = {path.name for path in made.out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "modeling_own.py"} <= names
    assert not {"optimizer.pt", "rng_state.pth", "trainer_state.json"} & names
    assert ("model.safetensors" in names) == (shards == "whole")
    assert json.loads((made.out / "tokenizer.json").read_text()) == {"of": 1500}
    again = type(models[0]).from_pretrained(made.out)
    agrees(again.state_dict(), models)
    with files.open(made.out) as checkpoint:
        assert checkpoint.made[0] == "polyak_average"
        assert len(checkpoint.made[1]["inputs"]) == 3
        # Tied names that the inputs lack are lacking in the output, too.
        assert ("lm_head.weight" in checkpoint.names) is False


def test_another_dtype_is_said_in_the_config(tmp_path):
    models = [gpt(seed) for seed in range(2)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / str(seed))
    files.average([tmp_path / "0", tmp_path / "1"], out=tmp_path / "mean", dtype="bfloat16")
    config = json.loads((tmp_path / "mean" / "config.json").read_text())
    assert "bfloat16" in {config.get("dtype"), config.get("torch_dtype")}
    assert load_file(tmp_path / "mean" / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16


def test_pytorch_model_bin_with_and_without_an_index(tmp_path):
    models = [gpt(seed) for seed in range(2)]
    for seed, model in enumerate(models):
        (tmp_path / str(seed)).mkdir()
        state = model.state_dict()
        if seed:
            torch.save(state, tmp_path / "1" / "pytorch_model.bin")
        else:
            names = [*state]
            half = {name: f"pytorch_model-0000{1 + (i > len(names) // 2)}-of-00002.bin" for i, name in enumerate(names)}
            for file in {*half.values()}:
                torch.save({name: state[name] for name in names if half[name] == file}, tmp_path / "0" / file)
            (tmp_path / "0" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": half}))
    files.average([tmp_path / "0", tmp_path / "1"], out=tmp_path / "mean")
    agrees(load_file(tmp_path / "mean" / "model.safetensors"), models)
    files.average([tmp_path / "0", tmp_path / "1"], out=tmp_path / "mean.pt")
    agrees(torch.load(tmp_path / "mean.pt", weights_only=True), models)


def test_a_pipeline_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    def pipeline(seed):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(10))

    made = [pipeline(seed) for seed in range(2)]
    for seed, one in enumerate(made):
        one.save_pretrained(tmp_path / str(seed))
    files.average([tmp_path / "0", tmp_path / "1"], out=tmp_path / "mean")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "mean")
    agrees(again.unet.state_dict(), [one.unet for one in made])
    # And a part alone, which is a folder of diffusers, too.
    files.average([tmp_path / "0" / "unet", tmp_path / "1" / "unet"], out=tmp_path / "unet")
    agrees(diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").state_dict(), [one.unet for one in made])


@pytest.mark.parametrize("nested", [True, False])
def test_folders_of_torch_distributed_checkpoint(nested, tmp_path):
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    for step, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        state = model.state_dict()
        whole = {"model": state, "optimizer": optimizer.state_dict(), "step": 7 + step} if nested else state
        dcp.save(whole, checkpoint_id=tmp_path / str(step))
    made = files.average([tmp_path / "0", tmp_path / "1"], out=tmp_path / "mean.safetensors")
    agrees(load_file(made.out), models)
    assert made.steps == ((7, 8) if nested else (0, 1))


def test_safetensors_of_torch_distributed_checkpoint(tmp_path):
    huggingface = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    models = [nn.Linear(3, 4) for _ in range(2)]
    for step, model in enumerate(models):
        writer = huggingface.HuggingFaceStorageWriter(str(tmp_path / str(step)), save_distributed=True)
        dcp.save(model.state_dict(), storage_writer=writer)
    files.average([tmp_path / "0", tmp_path / "1"], out=tmp_path / "mean.safetensors")
    agrees(load_file(tmp_path / "mean.safetensors"), models)


def test_shards_of_ranks_by_rows_and_columns(tmp_path):
    whole = torch.arange(48.0).reshape(6, 8)
    for number, columns in enumerate((slice(0, 3), slice(3, 8))):
        info = json.dumps({"w": {"saved_offsets": [0, columns.start]}})
        part = whole[:, columns].contiguous()
        save_file({"w": part}, tmp_path / f"shard-{number}.safetensors", {"DCP_SHARDING_INFO": info})
    with files.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("w"), whole)
        assert torch.equal(checkpoint.read("w", 5, 21), whole.flatten()[5:21])


def test_parts_that_do_not_cover_a_tensor_once(tmp_path):
    (tmp_path / "x").write_bytes(torch.arange(24.0).numpy().tobytes())
    file = RawFile(tmp_path / "x")

    def box(offset, starts, shape):
        return Box(file, 4 * offset, starts, shape, (shape[1], 1))

    rows = join("w", torch.float32, (4, 6), [box(12, (2, 0), (2, 6)), box(0, (0, 0), (2, 6))])
    assert rows.parts
    assert torch.equal(read_values(rows, 0, 24), torch.arange(24.0))
    grid = join("w", torch.float32, (4, 6), [box(6 * i, (2 * (i // 2), 3 * (i % 2)), (2, 3)) for i in range(4)])
    assert torch.equal(read_values(grid, 0, 24).reshape(4, 6)[2:, 3:], torch.arange(18.0, 24.0).reshape(2, 3))
    for wrong in ([box(0, (0, 0), (2, 6))], [box(0, (0, 0), (2, 6))] * 2, [box(0, (3, 0), (4, 6))]):
        with pytest.raises(ValueError, match=r"tensor 'w'"):
            join("w", torch.float32, (4, 6), wrong)


def test_indices_that_point_elsewhere_or_lack_shards(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    for file, kind, match in (
        ("../outside.safetensors", StateError, "expected one in the same folder"),
        (str(tmp_path / "outside.safetensors"), StateError, "expected one in the same folder"),
        ("two.safetensors", MissingFileError, r"shard 'two\.safetensors' .* is missing"),
        (7, StateError, "expected one in the same folder"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(kind, match=match):
            files.open(folder)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(StateError, match=r"lacks the tensor 'b'"):
        files.open(folder)
    for text in ("[]", "{", "[" * 100_000, json.dumps({"weight_map": []})):
        index.write_text(text)
        with pytest.raises(StateError, match="damaged"):
            files.open(folder)


def test_a_folder_of_checkpoints_and_one_that_is_there(tmp_path):
    for name in ("a", "b"):
        gpt(0).save_pretrained(tmp_path / "run" / name)
    with pytest.raises(StateError, match=r"holds checkpoints and is none itself: a, b"):
        files.open(tmp_path / "run")
    paths = [tmp_path / "run" / "a", tmp_path / "run" / "b"]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    for out, match in (("there", "is there already"), ("run/a/mean", "is the input"), ("run", "is the input")):
        with pytest.raises(ConfigError, match=match):
            files.average(paths, out=tmp_path / out)


def test_quantised_by_the_config(tmp_path):
    for name in ("a", "b"):
        gpt(0).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantised: .*gptq"):
        files.average([tmp_path / "a", tmp_path / "b"], out=tmp_path / "o")
