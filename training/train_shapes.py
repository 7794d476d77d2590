"""Train the embedded model: first an autoencoder for the latents, then the MMDiT as a rectified flow, as SD3 does it.

    python -m training.train_shapes --out out

writes ``out/shapes.safetensors`` and, along the way, picture grids, a log and a table of how often the model is right.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tacod.embedded.modules import Decoder, Residual, Text
from tacod.rank.families.sd3 import SD3
from tacod.rank.parallel.sequence import SequenceParallel
from training import shapes_data
from training.measure import verdict
from training.shapes_data import KINDS, LENGTH, VOCABULARY, Scenes, draw_scenes

CHANNELS, DEPTH, WIDTH, TEXT_WIDTH, GRID = 16, 3, 192, 96, 32
CONFIG: dict[str, Any] = {
    "image_model": "sd3",
    "in_channels": CHANNELS,
    "patch_size": 2,
    "out_channels": CHANNELS,
    "depth": DEPTH,
    "input_size": None,
    "adm_in_channels": TEXT_WIDTH,
    "context_size": TEXT_WIDTH,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": TEXT_WIDTH, "out_features": WIDTH},
    },
    "num_patches": GRID * GRID,
    "pos_embed_max_size": GRID,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}
"""ComfyUI's ``unet_config`` for the MMDiT."""
SHIFT = 3.0
"""The schedule's shift when sampling, which is ComfyUI's for SD3."""


@dataclass
class Plan:
    """What a run does; a stage ends at its steps or its seconds, whichever comes first."""

    out: Path
    device: str = "cuda"
    seed: int = 0
    autoencoder_steps: int = 4500
    autoencoder_seconds: float = 1200
    autoencoder_batch: int = 48
    autoencoder_rate: float = 1.5e-3
    flow_steps: int = 24000
    flow_seconds: float = 7200
    flow_batch: int = 512
    flow_rate: float = 1.2e-3
    pool: int = 16384
    """Pictures that are drawn and encoded at a time; each is used ``reuse`` times on average."""
    reuse: int = 6
    drop: float = 0.1
    """How often the sentence is empty, for guidance."""
    average: float = 0.999
    compile: bool = True
    prompts: int = 400
    deadline: float = 7800
    """Seconds from the start after which no stage goes on."""
    began: float = field(default_factory=time.monotonic)
    log: list[str] = field(default_factory=list)

    def say(self, message: str) -> None:
        print(message, flush=True)
        self.log.append(message)
        (self.out / "log.txt").write_text("\n".join(self.log) + "\n")


class Encoder(nn.Module):
    """RGB [B, 3, H, W] from -1 to 1 to latents [B, 16, H/8, W/8] of zero mean and unit variance in every channel."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(8),
            nn.Conv2d(192, width, 3, padding=1),
            *(Residual(width) for _ in range(3)),
            nn.Conv2d(width, CHANNELS, 1),
        )
        self.norm = nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        with torch.autocast(pictures.device.type, enabled=False):
            latent: Tensor = self.norm(self.layers(pictures))
        return latent


class Network(nn.Module):
    """The trained part of the flow stage: word ids and noisy latents to a velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Text(len(VOCABULARY), LENGTH, TEXT_WIDTH)
        self.model = SD3(CONFIG)

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        context, y = self.text(words)
        velocity: Tensor = self.model(SequenceParallel(), x, sigma * 1000, context=context, y=y)
        return velocity


# ---------------------------------------------------------------------------------------------- initial weights


def initialise(network: Network) -> None:
    """As DiT and SD3 start: Xavier, and zeros for every modulation and for the last layer; `SD3` sets the positions."""
    model = network.model
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(module.weight, std=0.02)
            if "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
        elif name.endswith((".ln_q", ".ln_k")):
            nn.init.ones_(module.weight)
    for table in (*network.text.words, network.text.position):
        nn.init.normal_(table.weight, std=0.5)


# ---------------------------------------------------------------------------------------------- stages


class Clock:
    """How far a stage is, from 0 to 1: by steps or by seconds, whichever is further."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds, self.step = steps, seconds, 0
        self.began: float | None = None

    def start(self, left: float) -> None:
        """Count seconds from here on, after compilation; no more than ``left``."""
        self.began, self.seconds = time.monotonic(), min(self.seconds, left)

    @property
    def elapsed(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began

    @property
    def progress(self) -> float:
        return max(self.step / self.steps, self.elapsed / self.seconds)

    def rate(self, peak: float, warmup: int = 400) -> float:
        """A linear warm-up, then half a cosine."""
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))
        return peak * min(1.0, (self.step + 1) / warmup) * max(0.002, fall)


Module = TypeVar("Module", bound=nn.Module)


class Average(Generic[Module]):
    """An exponential moving average of parameters."""

    def __init__(self, module: Module, decay: float) -> None:
        self.decay = decay
        self.shadow = copy.deepcopy(module).eval().requires_grad_(False)
        self.pairs = list(zip(self.shadow.parameters(), module.parameters(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([s for s, _ in self.pairs], [p.detach() for _, p in self.pairs], weight)


def _autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def _compiled(function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if plan.compile else function


def _render(plan: Plan) -> Callable[[Scenes], Tensor]:
    """Scenes to pictures from -1 to 1."""
    draw = _compiled(shapes_data.render_columns, plan)
    return lambda scenes: draw(shapes_data.columns(scenes), 256) * 2 - 1


def _edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def train_autoencoder(plan: Plan, render: Callable[[Scenes], Tensor]) -> tuple[Encoder, Decoder, dict[str, Any]]:
    """L1 on pixels and on edges; noise on the latents makes them unit-sized, smooth and robust, so no KL is needed."""
    generator = torch.Generator(plan.device).manual_seed(plan.seed + 1)
    torch.manual_seed(plan.seed)
    encoder, decoder = Encoder().to(plan.device), Decoder().to(plan.device)
    for module in (encoder, decoder):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, plan.autoencoder_rate, (0.9, 0.99), weight_decay=0.0)
    average = Average(decoder, plan.average)

    def loss_of(pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        latent = encoder(pictures)
        with _autocast(plan.device):
            out = decoder(latent + noise).float()
        pixel = F.l1_loss(out, pictures)
        return pixel + sum(F.l1_loss(a, b) for a, b in zip(_edges(out), _edges(pictures), strict=True)), pixel

    loss_of = _compiled(loss_of, plan)
    clock, pixels = Clock(plan.autoencoder_steps, plan.autoencoder_seconds), []
    size = (plan.autoencoder_batch, CHANNELS, 32, 32)
    while clock.progress < 1:
        with torch.no_grad():
            part = clock.step % 100 * plan.autoencoder_batch
            if part == 0:
                scenes = draw_scenes(100 * plan.autoencoder_batch, generator)
            pictures = render(scenes[part : part + plan.autoencoder_batch])
            strength = 0.5 * torch.rand((size[0], 1, 1, 1), generator=generator, device=plan.device)
            noise = strength * torch.randn(size, generator=generator, device=plan.device)
        loss, pixel = loss_of(pictures, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = clock.rate(plan.autoencoder_rate)
        optimizer.step()
        average.update(clock.step)
        clock.step += 1
        if clock.step == 5:
            clock.start(plan.began + plan.deadline - time.monotonic())
        if clock.step % 20 == 0:
            pixels.append(pixel.item())
        if clock.step % 500 == 0:
            plan.say(f"autoencoder {clock.step:6d}  {clock.elapsed:5.0f} s  L1 {sum(pixels[-25:]) / 25:.5f}")
    encoder.eval().requires_grad_(False)
    with torch.no_grad():  # over fresh pictures and with the averaged decoder; the latents' moments anew
        encoder.norm.reset_running_stats()
        encoder.norm.train().momentum = None
        batches = [render(draw_scenes(plan.autoencoder_batch, generator)) for _ in range(20)]
        for batch in batches:
            encoder(batch)
        encoder.eval()
        clean = sum(F.l1_loss(average.shadow(encoder(b)), b).item() for b in batches) / len(batches)
        error = sum(F.mse_loss(average.shadow(encoder(b)).clamp(-1, 1), b).item() for b in batches) / len(batches)
    figures = {
        "autoencoder steps": clock.step,
        "autoencoder seconds": round(clock.elapsed, 1),
        "autoencoder L1 (pixels from -1 to 1)": round(clean, 5),
        "autoencoder PSNR": round(-10 * math.log10(error / 4), 2),
    }
    return encoder, average.shadow, figures


def latents(plan: Plan, encoder: Encoder, render: Callable[[Scenes], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pools of (latents, words), drawn and encoded afresh for ever."""
    generator = torch.Generator(plan.device).manual_seed(plan.seed + 2)
    chunk = min(plan.pool, 256)
    while True:
        scenes = draw_scenes(plan.pool, generator)
        with torch.no_grad(), _autocast(plan.device):
            x = [encoder(render(scenes[i : i + chunk])) for i in range(0, plan.pool, chunk)]
        yield torch.cat(x), scenes.words


def train_flow(
    plan: Plan, encoder: Encoder, decoder: Decoder, render: Callable[[Scenes], Tensor]
) -> tuple[Network, dict[str, Any]]:
    """Rectified flow: x = (1 - sigma) * x0 + sigma * noise, the target is noise - x0 (arXiv:2403.03206)."""
    generator = torch.Generator(plan.device).manual_seed(plan.seed + 3)
    rand = partial(torch.rand, generator=generator, device=plan.device)
    torch.manual_seed(plan.seed)
    network = Network()
    initialise(network)
    network.to(plan.device)
    parameters = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, plan.flow_rate, (0.9, 0.99), fused=plan.device == "cuda")
    average = Average(network, plan.average)

    def loss_of(x0: Tensor, noise: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        with _autocast(plan.device):
            velocity = network((1 - s) * x0 + s * noise, sigma, words)
        return F.mse_loss(velocity.float(), noise - x0)

    loss_of = _compiled(loss_of, plan)
    clock, losses = Clock(plan.flow_steps, plan.flow_seconds), []
    for pool, captions in latents(plan, encoder, render):
        for _ in range(max(1, plan.pool * plan.reuse // plan.flow_batch)):
            n = plan.flow_batch
            index = torch.randint(len(pool), (n,), generator=generator, device=plan.device)
            words = captions[index] * (rand(n, 1) >= plan.drop)
            u = (torch.arange(n, device=plan.device) + rand(n)) / n  # stratified over the batch
            sigma = torch.sigmoid(0.5 + 1.4 * torch.special.ndtri(u.clamp(1e-5, 1 - 1e-5)))
            x0 = pool[index].float()
            noise = torch.randn(x0.shape, generator=generator, device=plan.device)
            loss = loss_of(x0, noise, sigma, words)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = clock.rate(plan.flow_rate)
            optimizer.step()
            average.update(clock.step)
            clock.step += 1
            if clock.step == 5:
                clock.start(plan.began + plan.deadline - time.monotonic())
            if clock.step % 20 == 0:
                losses.append(loss.item())
            if clock.step % 500 == 0:
                plan.say(f"flow {clock.step:6d}  {clock.elapsed:5.0f} s  loss {sum(losses[-25:]) / 25:.4f}")
            if clock.step % 5000 == 0:
                export(plan.out / "shapes.safetensors", average.shadow, decoder)
                grid(plan, average.shadow, decoder, plan.out / "grid.png", 2.5)
            if clock.progress >= 1:
                break
        if clock.progress >= 1:
            break
    last = losses[-50:] or [loss.item()]
    figures = {
        "flow steps": clock.step,
        "flow seconds": round(clock.elapsed, 1),
        "flow loss (mean of the last 1000 steps)": round(sum(last) / len(last), 4),
        "pictures drawn for the flow": plan.pool * math.ceil(clock.step / (plan.pool * plan.reuse // plan.flow_batch)),
    }
    return average.shadow, figures


# ---------------------------------------------------------------------------------------------- export and evaluation


def export(path: Path, network: Network, decoder: Decoder) -> None:
    """Everything in one file, in bf16."""
    parts = {"model.diffusion_model.": network.model, "text.": network.text, "decoder.": decoder}
    tensors = {
        prefix + key: value.detach().to("cpu", torch.bfloat16).contiguous()
        for prefix, module in parts.items()
        for key, value in module.state_dict().items()
    }
    metadata = {
        "tacod.config": json.dumps(CONFIG),
        "tacod.vocabulary": json.dumps(VOCABULARY),
        "title": "TACO-DiT shapes",
        "description": "Flat shapes on a flat background from a sentence; the model that comes with TACO-DiT.",
        "license": "Apache-2.0",
    }
    save_file(tensors, path, metadata)


def sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """Noise levels [steps + 1] from 1 to 0, moved towards 1 by ``shift``."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def sample(
    model: nn.Module, noise: Tensor, positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor], cfg: float,
    steps: int = 20,
) -> Tensor:  # fmt: skip
    """Euler steps from noise to latents, both as the model sees them [B, 16, h, w]; conditioning is (context, y)."""
    x, levels, batch = noise, sigmas(steps).tolist(), len(noise)
    both = [torch.cat([p, n.expand(batch, *n.shape[1:])]) for p, n in zip(positive, negative, strict=True)]
    for here, there in pairwise(levels):
        if cfg == 1:
            t = torch.full((batch,), here * 1000, device=x.device)
            velocity = model(SequenceParallel(), x, t, context=positive[0], y=positive[1])
        else:
            t = torch.full((2 * batch,), here * 1000, device=x.device)
            yes, no = model(SequenceParallel(), torch.cat([x, x]), t, context=both[0], y=both[1]).chunk(2)
            velocity = no + cfg * (yes - no)
        x = x + (there - here) * velocity
    return x


@torch.no_grad()
def draw(
    plan: Plan, network: Network, decoder: Decoder, words: Tensor, cfg: float, steps: int = 20, seed: int = 0
) -> Tensor:
    """Pictures for captions, uint8 RGB [B, 256, 256, 3] on the CPU; in fp32 with the weights as they are."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for some in torch.split(words.to(plan.device), 100):
        noise = torch.randn((len(some), CHANNELS, 32, 32), generator=generator).to(plan.device)
        x = sample(network.model, noise, network.text(some), network.text(torch.zeros_like(some[:1])), cfg, steps)
        out = decoder(x).clamp(-1, 1)
        pictures.append(((out + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(pictures)


def grid(plan: Plan, network: Network, decoder: Decoder, path: Path, cfg: float) -> None:
    """Pictures for 32 held-out sentences in one PNG, and the sentences in ``prompts.txt`` beside it."""
    scenes = draw_scenes(32, torch.Generator().manual_seed(plan.seed + 5), held_out=True)
    pictures = draw(plan, network, decoder, scenes.words, cfg)
    rows = torch.cat([torch.cat(list(row), 1) for row in torch.split(pictures, 8)], 0)
    Image.fromarray(rows.numpy()).save(path)
    path.with_name("prompts.txt").write_text("\n".join(scenes.prompts()) + "\n")


def rounded(module: Module) -> Module:
    """The module with its weights as the file has them, computing in fp32."""
    return copy.deepcopy(module).to(torch.bfloat16).float()


def evaluate(plan: Plan, network: Network, decoder: Decoder) -> dict[str, Any]:
    """How often held-out sentences come out right, per kind of sentence, guidance and number of steps."""
    everything = draw_scenes(plan.prompts, torch.Generator().manual_seed(plan.seed + 4), held_out=True)
    table: dict[str, Any] = {}
    for cfg, steps in ((3.0, 20), (1.0, 20), (2.0, 20), (4.5, 20), (3.0, 10)):
        scenes = everything if not table else everything[: plan.prompts * 2 // 5]
        pictures = draw(plan, network, decoder, scenes.words, cfg, steps)
        verdicts = torch.tensor([verdict(pictures[i], scenes[i : i + 1]) for i in range(len(scenes))]).float()
        row = {"all": verdicts[:, 0].mean().item(), "shapes too": verdicts[:, 1].mean().item()}
        for index, kind in enumerate(KINDS):
            row[kind] = verdicts[scenes.kind == index, 0].mean().item()
        table[f"cfg {cfg} steps {steps}"] = {key: round(value, 4) for key, value in row.items()}
        plan.say(f"cfg {cfg} steps {steps:2d}  " + "  ".join(f"{key} {value:.1%}" for key, value in row.items()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Plan(Path())).items():
        if name in ("out", "log", "began"):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(flag, type=type(default), default=default)
    parser.add_argument("--out", type=Path, required=True)
    plan = Plan(**vars(parser.parse_args()))
    plan.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    render = _render(plan)
    encoder, decoder, figures = train_autoencoder(plan, render)
    plan.say(f"{json.dumps(figures)}  ({time.monotonic() - plan.began:.0f} s so far)")
    network, more = train_flow(plan, encoder, decoder, render)
    figures |= more
    plan.say(f"{json.dumps(more)}  ({time.monotonic() - plan.began:.0f} s so far)")
    export(plan.out / "shapes.safetensors", network, decoder)
    figures["parameters"] = {
        name: sum(p.numel() for p in module.state_dict().values())
        for name, module in (("mmdit", network.model), ("text", network.text), ("decoder", decoder))
    }
    network, decoder = rounded(network), rounded(decoder)
    for cfg in (1.0, 3.0):
        grid(plan, network, decoder, plan.out / f"grid_cfg{cfg:.0f}.png", cfg)
    figures["right"] = evaluate(plan, network, decoder)
    figures["seconds"] = round(time.monotonic() - plan.began)
    plan.say(json.dumps(figures))
    (plan.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
