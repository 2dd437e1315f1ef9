"""The trained modules are those that diffusers, transformers and qie run: the shortcuts of training change no value."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from pocket.checkpoint import FILES, read_checkpoint, write_checkpoint, write_configs
from pocket.data.edits import EDITS, Instruction, instruction_text
from pocket.data.examples import draw_example
from pocket.model import vae as pocket_vae
from pocket.model.batches import BatchEncoder, draw_training_example, latent_metric, pack, source_index, unpack
from pocket.model.prompts import PromptTokenizer
from pocket.model.text_encoder import TextEncoder, to_patches
from pocket.model.transformer import Transformer
from pocket.training import text_encoder as text_encoder_training
from pocket.training import transformer as transformer_training
from pocket.training.muon import Muon, orthogonalize, split_parameters
from pocket.training.run import Run, learning_rate
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.tokenizer import check_tokenizer
from qie.compiler.recipe.load import load_recipe
from qie.compiler.validation.reference import load_reference
from qie.engines.inputs.prompt import PREFIX_TOKENS
from tests.support.soak import attempts


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training after one step of each module, not compiled."""
    folder = tmp_path_factory.mktemp("pocket")
    torch.manual_seed(0)
    vae = pocket_vae.build_vae()
    for parameter in vae.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    advance(Run(folder / "vae", vae, torch.optim.SGD([{"params": vae.parameters(), "peak": 0.0}])))
    write_configs(folder / "configs")
    for subfolder, model in modules(folder).items():
        for name, parameter in model.named_parameters():
            parameter.data.add_((0.1 if "embed_tokens" in name else 0.03) * torch.randn_like(parameter))
        advance(Run(folder / subfolder, model, torch.optim.SGD([{"params": model.parameters(), "peak": 0.0}])))
    torch.save((torch.linspace(-0.2, 0.2, 16), torch.linspace(0.8, 1.5, 16)), folder / "latents.pt")
    return folder


def modules(folder: Path) -> dict[str, nn.Module]:
    """Text encoder and transformer with initial weights."""
    configs = folder / "configs"
    return {"text_encoder": TextEncoder(configs), "transformer": Transformer(configs, compiled=False)}


def advance(run: Run) -> None:
    run.advance(1.0)
    run.save()


@pytest.fixture(scope="module")
def checkpoint(training: Path) -> Path:
    write_checkpoint(training, training / "checkpoint")
    return training / "checkpoint"


def test_the_folded_vae_equals_that_of_diffusers() -> None:
    torch.manual_seed(0)
    folded = pocket_vae.build_vae()
    for parameter in folded.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    whole = AutoencoderKLQwenImage(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    whole.load_state_dict(pocket_vae.unfold(folded.state_dict(), whole))
    x = torch.rand(2, 3, 1, 32, 48) * 2 - 1
    with torch.no_grad():
        z = pocket_vae.encode(folded, x)
        torch.testing.assert_close(whole.encode(x).latent_dist.mode(), z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            whole.decode(z).sample, pocket_vae.decode(folded, z).clamp(-1, 1), rtol=1e-4, atol=1e-5
        )


def test_patches_are_those_of_the_image_processor(training: Path) -> None:
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(training / "configs" / "processor")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 1, 84, 140, 3), np.uint8)
    expected = processor([Image.fromarray(image) for image in images[:, 0]], return_tensors="pt")
    patches, grid = to_patches(torch.from_numpy(images))
    torch.testing.assert_close(patches, expected.pixel_values)
    assert torch.equal(grid, expected.image_grid_thw)


def test_source_index_follows_geometric_edits() -> None:
    plain = np.arange(6).reshape(2, 3)
    assert (source_index([], 2, 3) == plain.ravel()).all()
    assert (source_index([Instruction("blur"), Instruction("mirror")], 2, 3) == plain[:, ::-1].ravel()).all()
    assert (source_index([Instruction("upside down")], 2, 3) == plain[::-1].ravel()).all()
    square = np.arange(9).reshape(3, 3)
    assert (source_index([Instruction("rotate left"), Instruction("sepia")], 3, 3) == np.rot90(square).ravel()).all()


def test_packing_is_that_of_the_pipeline() -> None:
    from tests.support.diffusers import pack_latents

    z = torch.randn(2, 16, 8, 12)
    packed = pack(z)
    assert torch.equal(packed, pack_latents(z, 2, 16, 8, 12))
    assert torch.equal(unpack(packed, 4, 6), z)


@pytest.mark.parametrize(("shape", "seed"), [((128, 128, 1), 1), ((96, 160, 1), 2), ((128, 128, 2), 3)])
def test_the_trained_modules_are_those_that_diffusers_runs(
    training: Path, checkpoint: Path, shape: tuple[int, int, int], seed: int
) -> None:
    """Prompt embeddings, latents and velocity with the weights of the checkpoint, which are rounded to bfloat16."""
    height, width, count = shape
    rng = np.random.default_rng(seed)
    examples = [draw_example(rng, height, width, images=count) for _ in range(2)]
    reference = load_reference(checkpoint)
    model = Transformer(training / "configs", compiled=False)
    state = {f"transformer.{k}": v for k, v in reference.pipeline.transformer.state_dict().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("auxiliary.") for name in missing)
    encoder = BatchEncoder(training, compiled=False)
    state = {f"text_encoder.{k}": v for k, v in reference.pipeline.text_encoder.state_dict().items()}
    missing, unexpected = encoder.text_encoder.load_state_dict(state, strict=False)
    assert not unexpected
    with torch.no_grad():
        prompt = encoder.text_encoder.prompt_embeds(encoder.tokenizer.batch(examples))
    batch = replace(encoder.batch(examples, shape), prompt=prompt)
    for example, embeds, mask in zip(examples, prompt, batch.prompt_mask, strict=True):
        images = [Image.fromarray(image) for image in example.images]
        expected = reference.prompt_embeds(images, example.text)
        assert int(mask.sum()) == len(expected)
        np.testing.assert_allclose(embeds[: len(expected)], expected, rtol=1e-3, atol=1e-4)

    latents = [reference.encode_image(image) for image in examples[0].images]
    references = batch.references[0].float().numpy().reshape(count, -1, 64)
    for encoded, expected in zip(references, latents, strict=True):
        assert np.abs(encoded - expected).max() < 0.1 * expected.std()  # encoded in bfloat16 for speed

    noisy = torch.randn(2, height * width // 256, 64)
    with torch.no_grad():
        velocity = model(batch, noisy, torch.tensor([0.7, 0.7]))[0][0]
    length = int(batch.prompt_mask[0].sum())
    grid = (height // 16, width // 16)
    expected = reference.velocity(
        noisy[:1].numpy(), list(references[:, None]), prompt[:1, :length].numpy(), 0.7, [grid] * (1 + count)
    )
    np.testing.assert_allclose(velocity, expected[0], rtol=1e-3, atol=1e-4)


def test_the_text_encoder_learns(training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder_training, "BATCH", attempts(8, text_encoder_training.BATCH))
    torch.manual_seed(0)
    encoder, tokenizer = TextEncoder(training / "configs"), PromptTokenizer(training / "configs")
    matrices, rest = split_parameters(encoder, text_encoder_training.ADAMW)
    optimizer = Muon([{"params": matrices, "matrices": True, "lr": 0.03}, {"params": rest, "lr": 1e-3}])
    losses = []
    for step in range(attempts(6, 25)):
        losses.append(text_encoder_training.train_step(encoder, tokenizer, step))
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(losses[-attempts(2, 5) :]) < attempts(90, 50) / 100 * losses[0]


def test_mentions_end_at_the_last_token_of_an_instruction_or_an_option(training: Path) -> None:
    tokenizer, rng = PromptTokenizer(training / "configs"), np.random.default_rng(0)
    examples = [draw_training_example(rng, (128, 128, 1)) for _ in range(40)]
    assert {len(example.instructions) for example in examples} == {0, 1, 2}
    prompts = tokenizer.batch(examples)
    indices = torch.arange(200.0)[:, None].expand(len(examples), -1, 1)
    tokens = TextEncoder(training / "configs").mention_states(indices, prompts)[:, 0].long() + PREFIX_TOKENS
    named = [mention.instruction for mention in prompts.mentions if not mention.option]
    assert named == [instruction for example in examples for instruction in example.instructions]
    assert {mention.option for mention in prompts.mentions} == {"", "color", "shape", "place"}
    for mention, (row, _), token in zip(prompts.mentions, prompts.mention_index, tokens, strict=True):
        text = tokenizer.tokenizer.decode(prompts.input_ids[row, : token + 1].tolist()).lower()
        instruction = mention.instruction
        phrases = [instruction_text(instruction, i).lower() for i in range(len(EDITS[instruction.name].phrases))]
        assert text.endswith(dict(instruction.options)[mention.option] if mention.option else tuple(phrases))


def test_a_step_of_the_transformer_reaches_every_parameter(training: Path) -> None:
    model = Transformer(training / "configs", compiled=False)
    shape = (96, 160, 1)
    rng = np.random.default_rng(0)
    encoder = BatchEncoder(training, compiled=False)
    batch = encoder.batch([draw_training_example(rng, shape) for _ in range(2)], shape)
    state = torch.load(training / "transformer" / "state.pt", weights_only=True)["model"]
    model.load_state_dict(state)
    loss, weighted, auxiliary = transformer_training.train_step(model, batch, 2 * torch.eye(16))
    assert loss > 0.1
    assert weighted == pytest.approx(2 * loss, rel=1e-5)
    assert auxiliary > 1
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    last = "transformer.transformer_blocks.4."
    unread = ("attn.to_add_out", "attn.norm_added_q", "attn.add_q_proj", "txt_mlp", "txt_mod")
    assert all(name.startswith(last) and any(u in name for u in unread) for name in silent)


def test_the_metric_of_latents_ranks_their_effect_on_the_image(training: Path) -> None:
    encoder = BatchEncoder(training, compiled=False)
    metric = latent_metric(encoder, images=8)
    torch.testing.assert_close(metric, metric.T)
    assert metric.diagonal().mean() == pytest.approx(1)
    torch.manual_seed(0)
    z = torch.randn(4, 16, 1, 8, 8)
    costs = []
    for channel in (metric.diagonal().argmin(), metric.diagonal().argmax()):
        small = torch.zeros_like(z)
        small[:, channel] = 0.01 * encoder.std[channel] * torch.randn(4, 1, 8, 8)
        with torch.no_grad():
            change = pocket_vae.decode(encoder.vae, z + small) - pocket_vae.decode(encoder.vae, z)
        costs.append(change.square().mean().item())
    assert costs[0] < costs[1]


def test_the_checkpoint_is_one_of_qie(checkpoint: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    check_tokenizer(opened)
    default = opened.model.schedules(load_recipe("cpu"))[0]
    assert default.guidance == 1.0
    assert sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors")) < 24e6
    assert json.loads((checkpoint / "vae" / "config.json").read_text())["latents_std"][15] == pytest.approx(1.5)


def test_a_training_resumes_from_a_checkpoint(training: Path, checkpoint: Path, tmp_path: Path) -> None:
    read_checkpoint(checkpoint, tmp_path / "training")
    write_checkpoint(tmp_path / "training", tmp_path / "again")
    for file in FILES.values():
        again, before = (load_file(folder / file) for folder in (tmp_path / "again", checkpoint))
        assert again.keys() == before.keys()
        assert all(torch.equal(again[name], value) for name, value in before.items())
    assert (tmp_path / "again" / "vae" / "config.json").read_bytes() == (
        checkpoint / "vae" / "config.json"
    ).read_bytes()
    for subfolder, model in modules(training).items():
        run = Run(tmp_path / "training" / subfolder, model, Muon([{"params": list(model.parameters()), "peak": 0.0}]))
        assert run.step == 1
        advance(run)  # whose state has the auxiliary heads, which a checkpoint lacks
        assert Run(tmp_path / "training" / subfolder, model, Muon([{"params": list(model.parameters())}])).step == 2


def test_muon_orthogonalizes_matrices() -> None:
    torch.manual_seed(0)
    for shape in ((24, 8), (8, 24), (16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def train(folder: Path, steps: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
        matrices, rest = split_parameters(model, ("2.",))
        assert len(matrices) == 1
        groups = [{"params": matrices, "matrices": True, "peak": 0.02}, {"params": rest, "peak": 1e-2}]
        run = Run(folder, model, Muon(groups))
        while run.step < steps:
            torch.manual_seed(run.step)
            x = torch.randn(16, 4)
            (model(x) - x[:, :2]).square().mean().backward()
            run.advance(1.0)
        run.save()
        return {**model.state_dict(), **run.average.weights()}

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    parts = train(tmp_path / "parts", 6)
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert rates[99] == max(rates) == 1
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] < 1e-4
