"""The training teaches the model that diffusers, transformers and qie run: its short cuts change no value."""

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

from pocket import train_editor, train_reader, train_vae
from pocket.batches import Encoder, draw, importance, pack, source, unpack
from pocket.checkpoint import FILES, read, write, write_configs
from pocket.editor import Editor
from pocket.edits import EDITS, Instruction, say
from pocket.muon import Muon, orthogonal, split
from pocket.prompts import Prompter
from pocket.reader import Reader, to_patches
from pocket.run import Run, learning_rate
from pocket.samples import sample
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.tokenizer import check_tokenizer
from qie.compiler.recipe.load import load_recipe
from qie.compiler.validation.reference import load_reference
from qie.engines.inputs.prompt import PREFIX_TOKENS


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that has hardly begun: two steps of each part, without a compiler."""
    folder = tmp_path_factory.mktemp("pocket")
    torch.manual_seed(0)
    vae = train_vae.build()
    for parameter in vae.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    advance(Run(folder / "vae", vae, torch.optim.SGD([{"params": vae.parameters(), "peak": 0.0}])))
    write_configs(folder / "configs")
    for part, model in (("reader", Reader(folder / "configs")), ("editor", Editor(folder / "configs", compile_=False))):
        for name, parameter in model.named_parameters():
            parameter.data.add_((0.1 if "embed_tokens" in name else 0.03) * torch.randn_like(parameter))
        advance(Run(folder / part, model, torch.optim.SGD([{"params": model.parameters(), "peak": 0.0}])))
    torch.save((torch.linspace(-0.2, 0.2, 16), torch.linspace(0.8, 1.5, 16)), folder / "latents.pt")
    return folder


def advance(run: Run) -> None:
    run.advance(1.0)
    run.save()


@pytest.fixture(scope="module")
def checkpoint(training: Path) -> Path:
    write(training, training / "checkpoint")
    return training / "checkpoint"


def test_the_folded_vae_is_the_whole_one() -> None:
    torch.manual_seed(0)
    folded = train_vae.build()
    for parameter in folded.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    whole = AutoencoderKLQwenImage(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    whole.load_state_dict(train_vae.unfold(folded.state_dict(), whole))
    x = torch.rand(2, 3, 1, 32, 48) * 2 - 1
    with torch.no_grad():
        z = train_vae.encode(folded, x)
        torch.testing.assert_close(whole.encode(x).latent_dist.mode(), z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            whole.decode(z).sample, train_vae.decode(folded, z).clamp(-1, 1), rtol=1e-4, atol=1e-5
        )


def test_patches_are_the_processors(training: Path) -> None:
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(training / "configs" / "processor")
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (2, 1, 84, 140, 3), np.uint8)
    expected = processor([Image.fromarray(image) for image in seen[:, 0]], return_tensors="pt")
    patches, grid = to_patches(torch.from_numpy(seen))
    torch.testing.assert_close(patches, expected.pixel_values)
    assert torch.equal(grid, expected.image_grid_thw)


def test_where_the_content_of_a_token_comes_from() -> None:
    plain = np.arange(6).reshape(2, 3)
    assert (source([], 2, 3) == plain.ravel()).all()
    assert (source([Instruction("blur"), Instruction("mirror")], 2, 3) == plain[:, ::-1].ravel()).all()
    assert (source([Instruction("upside down")], 2, 3) == plain[::-1].ravel()).all()
    square = np.arange(9).reshape(3, 3)
    assert (source([Instruction("rotate left"), Instruction("sepia")], 3, 3) == np.rot90(square).ravel()).all()


def test_packing_is_the_pipelines() -> None:
    from diffusers import QwenImageEditPlusPipeline

    z = torch.randn(2, 16, 8, 12)
    packed = pack(z)
    assert torch.equal(packed, QwenImageEditPlusPipeline._pack_latents(z, 2, 16, 8, 12))
    assert torch.equal(unpack(packed, 4, 6), z)


@pytest.mark.parametrize(("form", "seed"), [((128, 128, 1), 1), ((96, 160, 1), 2), ((128, 128, 2), 3)])
def test_what_is_trained_is_what_diffusers_runs(
    training: Path, checkpoint: Path, form: tuple[int, int, int], seed: int
) -> None:
    """Prompt embeddings, latents and velocity, from the written checkpoint; weights are rounded to bfloat16 there."""
    height, width, pictures = form
    rng = np.random.default_rng(seed)
    drawn = [sample(rng, height, width, pictures=pictures) for _ in range(2)]
    reference = load_reference(checkpoint)
    model = Editor(training / "configs", compile_=False)
    state = {f"transformer.{k}": v for k, v in reference.pipeline.transformer.state_dict().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("seer.") for name in missing)
    encoder = Encoder(training, compile_=False)
    state = {f"text_encoder.{k}": v for k, v in reference.pipeline.text_encoder.state_dict().items()}
    missing, unexpected = encoder.reader.load_state_dict(state, strict=False)
    assert not unexpected
    with torch.no_grad():
        prompt = encoder.reader.prompt(encoder.prompter.prompts(drawn))
    batch = replace(encoder.batch(drawn, form), prompt=prompt)
    for row, found, words in zip(drawn, prompt, batch.words, strict=True):
        images = [Image.fromarray(image) for image in row.images]
        expected = reference.prompt_embeds(images, row.text)
        assert int(words.sum()) == len(expected)
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-3, atol=1e-4)

    latents = [reference.encode_image(image) for image in drawn[0].images]
    references = batch.references[0].float().numpy().reshape(pictures, -1, 64)
    for found, expected in zip(references, latents, strict=True):
        assert np.abs(found - expected).max() < 0.1 * expected.std()  # encoded in bfloat16 for speed

    noisy = torch.randn(2, height * width // 256, 64)
    with torch.no_grad():
        velocity = model(batch, noisy, torch.tensor([0.7, 0.7]))[0][0]
    length = int(batch.words[0].sum())
    grid = (height // 16, width // 16)
    expected = reference.velocity(
        noisy[:1].numpy(), list(references[:, None]), prompt[:1, :length].numpy(), 0.7, [grid] * (1 + pictures)
    )
    np.testing.assert_allclose(velocity, expected[0], rtol=1e-3, atol=1e-4)


def test_the_language_model_learns_to_read(training: Path) -> None:
    torch.manual_seed(0)
    reader, prompter = Reader(training / "configs"), Prompter(training / "configs")
    matrices, rest = split(reader, train_reader.ENDS)
    optimizer = Muon([{"params": matrices, "matrices": True, "lr": 0.03}, {"params": rest, "lr": 1e-3}])
    losses = []
    for step in range(25):
        losses.append(train_reader.train_step(reader, prompter, step))
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_where_a_text_is_asked_about(training: Path) -> None:
    """Each instruction's last token, whatever comes behind it, and each option's."""
    prompter, rng = Prompter(training / "configs"), np.random.default_rng(0)
    drawn = [draw(rng, (128, 128, 1)) for _ in range(40)]
    assert {len(one.asked) for one in drawn} == {0, 1, 2}
    prompts = prompter.prompts(drawn)
    states = Reader(training / "configs").said(torch.arange(200.0)[:, None].expand(len(drawn), -1, 1), prompts)
    assert [mark.step for mark in prompts.marks if not mark.key] == [step for one in drawn for step in one.asked]
    assert {mark.key for mark in prompts.marks} == {"", "colour", "shape", "place"}
    for mark, (row, _), place in zip(prompts.marks, prompts.places, states[:, 0].long() + PREFIX_TOKENS, strict=True):
        said = prompter.tokenizer.decode(prompts.input_ids[row, : place + 1].tolist()).lower()
        phrases = [say(mark.step, phrase).lower() for phrase in range(len(EDITS[mark.step.name].phrases))]
        assert said.endswith(dict(mark.step.options)[mark.key] if mark.key else tuple(phrases))


def test_a_step_of_the_editor_reaches_every_part(training: Path) -> None:
    model = Editor(training / "configs", compile_=False)
    form = (96, 160, 1)
    rng = np.random.default_rng(0)
    batch = Encoder(training, compile_=False).batch([draw(rng, form) for _ in range(2)], form)
    state = torch.load(training / "editor" / "state.pt", weights_only=True)["model"]
    model.load_state_dict(state)
    loss, weighed, seen = train_editor.train_step(model, batch, 2 * torch.eye(16))
    assert loss > 0.1
    assert weighed == pytest.approx(2 * loss, rel=1e-5)
    assert seen > 1
    silent = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    last = "transformer.transformer_blocks.4."
    unread = ("attn.to_add_out", "attn.norm_added_q", "attn.add_q_proj", "txt_mlp", "txt_mod")
    assert all(name.startswith(last) and any(u in name for u in unread) for name in silent)


def test_an_error_of_the_latents_counts_as_it_shows(training: Path) -> None:
    """The estimate of J' J tells what a small change of one kind costs in the picture."""
    encoder = Encoder(training, compile_=False)
    metric = importance(encoder, images=8)
    torch.testing.assert_close(metric, metric.T)
    assert metric.diagonal().mean() == pytest.approx(1)
    torch.manual_seed(0)
    z = torch.randn(4, 16, 1, 8, 8)
    costs = []
    for channel in (metric.diagonal().argmin(), metric.diagonal().argmax()):
        small = torch.zeros_like(z)
        small[:, channel] = 0.01 * encoder.std[channel] * torch.randn(4, 1, 8, 8)
        with torch.no_grad():
            moved = train_vae.decode(encoder.vae, z + small) - train_vae.decode(encoder.vae, z)
        costs.append(moved.square().mean().item())
    assert costs[0] < costs[1]


def test_the_checkpoint_is_one_of_qie(checkpoint: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    check_tokenizer(opened)
    default = opened.model.schedules(load_recipe("cpu"))[0]
    assert default.guidance == 1.0
    assert sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors")) < 24e6
    assert json.loads((checkpoint / "vae" / "config.json").read_text())["latents_std"][15] == pytest.approx(1.5)


def test_a_training_goes_on_from_a_checkpoint(training: Path, checkpoint: Path, tmp_path: Path) -> None:
    read(checkpoint, tmp_path / "training")
    write(tmp_path / "training", tmp_path / "again")
    for file in FILES.values():
        again, before = (load_file(folder / file) for folder in (tmp_path / "again", checkpoint))
        assert again.keys() == before.keys()
        assert all(torch.equal(again[name], value) for name, value in before.items())
    assert (tmp_path / "again" / "vae" / "config.json").read_bytes() == (
        checkpoint / "vae" / "config.json"
    ).read_bytes()
    for part, model in (
        ("reader", Reader(training / "configs")),
        ("editor", Editor(training / "configs", compile_=False)),
    ):
        run = Run(tmp_path / "training" / part, model, Muon([{"params": list(model.parameters()), "peak": 0.0}]))
        assert run.step == 1
        advance(run)  # with questions, which a checkpoint has not
        assert Run(tmp_path / "training" / part, model, Muon([{"params": list(model.parameters())}])).step == 2


def test_muon_makes_matrices_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((24, 8), (8, 24), (16, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def train(folder: Path, steps: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
        matrices, rest = split(model, ("2.",))
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
