"""MiniMax-H3 (MiniMax, 2026): video with sound of a text, pictures, sounds and videos.

Parameters are named as in the files that ComfyUI publishes, where the rows of queries, keys and values are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import DiT, LatentFormat, Method
from tacod.rank.families.config import fixed, integer, number, optional_integer, optional_number
from tacod.rank.families.inputs import Argument, Inputs, Number, Spec, Unread
from tacod.rank.families.minimax_h3_files import NAMES, detect_config, of_diffusers
from tacod.rank.families.minimax_h3_layout import (
    MOST_SEED,
    TEXT_TAG,
    TIMES,
    Layout,
    Run,
    modulated,
    payload_spec,
    shares,
)
from tacod.rank.families.minimax_h3_modulation import modulate
from tacod.rank.families.minimax_h3_parts import PATCH, Block, FinalLayer, TokenRefiner
from tacod.rank.families.minimax_h3_times import (
    MASKS,
    SIGMA_MIN,
    mask_levels,
    prepare_masks,
    shifted,
    times_of,
)
from tacod.rank.families.minimax_h3_tokens import given_rows, padded, sound_rows
from tacod.rank.families.noise import Flow
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.qkv import Rotation
from tacod_client.errors import ArgumentError, ModelUnsupported

__all__ = ["MiniMaxH3"]

_SHIFTS = "minimax_h3_sigma_shift_video", "minimax_h3_sigma_shift_audio"


class MiniMaxH3(DiT):
    """Text, image and reference to video with sound, of files with full or pruned modulations.

    ``config`` is ComfyUI's ``unet_config``. A file without ``rope.inv_freq``, as diffusers has them, has ``rope_theta``
    in it. Raises `ModelUnsupported`, naming the key, for a configuration that can't be.

    A batch of several images shares the masks and what is given; ComfyUI takes a batch of 1 only.
    """

    family: ClassVar[str] = "minimax_h3"
    title = "MiniMax-H3"
    models = ("FL2VA and Ref2VA, pruned or not", "FastH3")
    notes = True
    lora_marks = r"blocks[._]\d+[._](attn[._](qkv|out)_proj|adaln_proj[._]linear)([._]|$)"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "minimax_h3",
        "num_layers": 2,
        "token_refiner_num_layers": 1,
        "hidden_size": 64,
        "latents_dim": 4,
        "audio_latents_dim": 6,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "ffn_hidden_size": 80,
        "text_dim": 32,
        "timestep_input_dim": 32,
        "time_embed_hidden_size": 48,
        "time_embed_dim": 16,
        "rope_inv_freq_len": 2,
        "rope_theta": 10000.0,
    }
    diffusers: ClassVar[Mapping[str, Any]] = {"MiniMaxH3Transformer3DModel": of_diffusers}
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 7, "H": 48, "W": 84, "A": 37, "L": 512}
    downscale = 16
    image_models: ClassVar[tuple[str, ...]] = ("minimax_h3",)
    process = Flow()
    names = NAMES

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fixed(config, patch_size=list(PATCH), norm_eps=1e-5, qk_norm_eps=1e-5, final_norm_eps=1e-5)
        if integer(config, "head_bank", 1) > 1:
            raise ModelUnsupported(
                f"config key 'head_bank' is {config['head_bank']}: the file has that many output heads (PDD), of which "
                "each step takes some, which this version doesn't run; take a file with one head"
            )
        if config.get("gate_compress"):
            raise ModelUnsupported("config key 'gate_compress': weights of sparse attention, which this version lacks")
        self.hidden = hidden = integer(config, "hidden_size", 5376)
        self.heads = heads = integer(config, "num_attention_heads", 56)
        head_width = integer(config, "attention_head_dim", 128)
        self.width = heads * head_width
        self.channels = self.out_channels = integer(config, "latents_dim", 24)
        self.sound_channels = integer(config, "audio_latents_dim", 32)
        self.context_width = integer(config, "text_dim", 5120)
        self.shifts = number(config, "sigma_shift_video", 12.0), number(config, "sigma_shift_audio", 3.0)
        # Samplers hold the sound times the ratio of both noise levels, which goes to this number as they go to 0.
        self.sound_scale = self.shifts[0] / self.shifts[1]
        self.latent_format = LatentFormat(1.0, 0.0), LatentFormat(self.sound_scale, 0.0)
        ffn, time_width = integer(config, "ffn_hidden_size", 14336), integer(config, "time_embed_dim", 2688)
        frequencies = integer(config, "rope_inv_freq_len", 16)
        if 6 * frequencies > head_width:
            raise ModelUnsupported(
                f"config key 'rope_inv_freq_len' is {frequencies}; a head of {head_width} channels has room for "
                f"{head_width // 6} ('attention_head_dim')"
            )

        self.video_patch_proj = nn.Linear(4 * self.channels, hidden)
        self.audio_patch_proj = nn.Linear(self.sound_channels, hidden)
        self.condition_proj = nn.Linear(self.context_width, hidden)
        grid = optional_integer(config, "adaln_curve_grid", least=2)
        self.adaln_t_table = self.time_embedder = None
        islands = ["(video|audio)_patch_proj", r"final_layer\.(video|audio)_out", r"rope\."]
        if grid is not None:
            self.adaln_t_table = kit.drawn(grid, time_width)
            islands += ["adaln_t_table", r".*\.adaln_proj\."]
        else:
            self.time_inputs = integer(config, "timestep_input_dim", 256)
            inner = integer(config, "time_embed_hidden_size", 5376)
            self.time_embedder = kit.MLPEmbedder(self.time_inputs, time_width, ("proj_in", "proj_out"), hidden=inner)
            islands.append(r"time_embedder\.")
        self.fp32_weights = "|".join(islands)
        self.frequencies, self.theta = frequencies, optional_number(config, "rope_theta")
        if self.theta is None:
            inverse = nn.Parameter(torch.ones(frequencies), requires_grad=False)
            self.rope = nn.ParameterDict({"inv_freq": inverse})
        sizes = hidden, heads, head_width, ffn
        self.token_refiner = TokenRefiner(integer(config, "token_refiner_num_layers", 2, most=1024), *sizes)
        layers = integer(config, "num_layers", 50, most=1024)
        self.blocks = nn.ModuleList(Block(*sizes, time_width) for _ in range(layers))
        self.final_layer = FinalLayer(hidden, time_width, 4 * self.channels, self.sound_channels)

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`. All sizes are in the shapes."""
        marks = {"video_patch_proj.weight", "audio_patch_proj.weight"}
        return detect_config(tensors) if marks <= tensors.keys() else None

    @property
    def dtype(self) -> torch.dtype:
        """See `DiT.dtype`: that of weights which aren't always fp32."""
        dtype: torch.dtype = self.final_layer.norm.weight.dtype
        return dtype

    def methods(self) -> dict[str, Method]:
        """See `DiT.methods`: what refines a text, once for a run."""
        context = Argument(("B", "L", self.context_width), widths=(self.hidden,))
        return {"preprocess_text_embeds": Method({"context": context}, self._refined)}

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments`.

        ``x`` is a video and its sound of A steps in two channels. The masks are 1 where the latents are made anew.
        ``minimax_payload`` is ComfyUI's: what each token of the text is, and what is given. ``audio_scale`` is by how
        much the sampler's sound is larger than the noise levels of the video make it; 1 means that ``x`` has it at
        its own noise level.
        """
        both = ("B", self.channels, "T", "H", "W"), ("B", self.sound_channels, 2, "A")
        return {
            "x": Argument(both[0], many=True, others=both[1:]),
            "timestep": Argument(("B",), fp32=True),
            "context": Argument(("B", "L", self.hidden), widths=(self.context_width,)),
            "denoise_mask": Argument((1, 1, "T", "H", "W"), required=False, fp32=True),
            "audio_denoise_mask": Argument((1, 1, 2, "A"), required=False, fp32=True),
            "minimax_payload": payload_spec(self.channels, self.sound_channels),
            # A shift of 0 is that of a video that is noise at each step. For the sound ComfyUI divides 0 by 0 then.
            **dict(zip(_SHIFTS, (Number(0.0, 1e4), Number(1e-3, 1e4)), strict=True)),
            "control": Unread(),
        }

    def prepare(self, inputs: Inputs) -> Inputs:
        """See `DiT.prepare`: the values of masks, each once. A mask that hides nothing is dropped.

        The seed becomes a tensor, as a run with another one may be the same CUDA graph.
        """
        payload = inputs.get("minimax_payload", {})
        if "seed" in payload:
            seed = int(payload["seed"])
            signed = torch.tensor(seed - (MOST_SEED + 1 if seed > MOST_SEED // 2 else 0), device="cpu")
            inputs = inputs.replace(minimax_payload={**payload, "seed": signed})
        return prepare_masks(inputs)

    def of_run(self, condition: Inputs, seed: int) -> Inputs:
        """See `DiT.of_run`: what is given gets the run's noise, and the sound is as `latent_format` scales it."""
        for name in MASKS:
            if name in condition:
                raise ArgumentError(
                    f"{name}: a run makes all of its latents anew; call forward for each step", argument=name
                )
        payload = condition.get("minimax_payload", {})
        video, sound = (condition.get(name, usual) for name, usual in zip(_SHIFTS, self.shifts, strict=True))
        told = {"audio_scale": payload.get("audio_scale", self.sound_scale), _SHIFTS[0]: video / sound}
        for name, ratio in told.items():
            if not math.isclose(ratio, self.sound_scale, rel_tol=1e-6):
                name = f"minimax_payload.{name}" if name == "audio_scale" else name
                raise ArgumentError(
                    f"{name}: it makes the sound of a run {ratio:g} times as large, and this model's is scaled by "
                    f"{self.sound_scale:g}; leave it out, or call forward for each step",
                    argument=name,
                )
        return condition.replace(minimax_payload={"seed": seed, **payload, "audio_scale": self.sound_scale})

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`: text, what is given if anything is, sound and video."""
        layout = self._layout(arguments)
        for name, latent in zip(MASKS, arguments["x"], strict=True):
            if name in arguments and tuple(arguments[name].shape[2:]) != tuple(latent.shape[2:]):
                raise ArgumentError(
                    f"{name}: expected the sides of its latent, {list(latent.shape[2:])}; got "
                    f"{list(arguments[name].shape[2:])}",
                    argument=name,
                )
        text, tags = arguments["context"].shape[1], arguments.get("minimax_payload", {}).get("text_token_tags")
        if tags is not None and tags.shape[0] != text:
            name = "minimax_payload.text_token_tags"
            raise ArgumentError(f"{name}: {tags.shape[0]} tags, but the text has {text} tokens", argument=name)
        given = sum(run.count for run, _ in layout.given)
        return (text, *([given] if given else []), sum(run.count for run in layout.made))

    def output_shapes(self, latents: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """See `DiT.output_shapes`: those of the latents."""
        return list(latents)

    def timestep(self, sigma: Tensor) -> Tensor:
        """See `DiT.timestep`: the video's; the sound's noise level follows from it."""
        return sigma * 1000

    def prefix(self, f: ForwardPass, **arguments: Any) -> list[Tensor]:
        """See `DiT.prefix`: tokens of the text and of what is given, and all tokens' positions and modulations."""
        layout, context = self._layout(arguments), arguments["context"]
        device, dtype, length = context.device, context.dtype, context.shape[1]
        payload = arguments.get("minimax_payload", {})
        text = f.shard(self._refined(context))
        given = [run for run, _ in layout.given]
        rows = padded([given_rows(run, latent, payload) for run, latent in layout.given], self._inputs, device)
        tokens = f.sequence.shard(rows)
        tags = payload.get("text_token_tags")
        places = torch.zeros(length, 3, dtype=torch.float64)
        places[:, 0] = torch.arange(length)
        parts = [
            (places, torch.full((length,), TEXT_TAG, device=device) if tags is None else tags.to(device)),
            *([modulated(given, device)] if given else []),
            modulated(layout.made, device, *self._made_rows(layout, arguments)),
        ]
        mine = [tuple(f.sequence.shard(each, dim=0) for each in part) for part in parts]
        rotation = self._rotation(torch.cat([each for each, _ in mine]).float().to(device))
        embedded = self._embed(f, tokens, given, dtype)
        return [text.tokens, embedded, rotation.cos, rotation.sin, torch.cat([each for _, each in mine])]

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        video, sound = arguments["x"]
        payload, f.dtype = arguments.get("minimax_payload", {}), video.dtype
        text, given, cos, sin, segments = f.prefix
        f.layout, f.video_grid = self._layout(arguments), kit.Grid(video, PATCH)
        sigma = (arguments["timestep"] / 1000).clamp(min=SIGMA_MIN)
        sound_sigma = shifted(sigma, *(arguments.get(name, n) for name, n in zip(_SHIFTS, self.shifts, strict=True)))
        f.scale = payload.get("audio_scale", 1.0)
        if f.scale != 1:
            sound = sound * _per_image(sound_sigma / sigma, sound)
        f.sound, f.sound_sigma = sound, sound_sigma
        rows = padded([sound_rows(sound), f.video_grid.patches(video)], self._inputs, video.device)
        f.image = f.shard(rows, lambda chunk: self._embed(f, chunk, f.layout.made, f.dtype))
        lengths = self.lengths(arguments)
        streams = [Stream(text, lengths[:1])]
        if len(lengths) > 2:
            streams.append(Stream(given.expand(len(video), -1, -1), lengths[1:2]))
        f.joint = f.join(*streams, f.image)
        f.joint.rotation = Rotation(cos, sin, halves=True)
        made = [part.shape[1] for part in shares(f.sequence, f.image.tokens, f.layout.made)]
        times = times_of(sigma, sound_sigma, payload, arguments)
        masked = [0 if levels is None else len(levels) for levels, _ in mask_levels(arguments).values()]
        modulate(f, self.modulating, times, masked, lambda each: self._conditioning(each, f.dtype), segments, made)

    @property
    def trunk(self) -> Sequence[Any]:
        """See `DiT.trunk`."""
        return list(self.blocks)

    def end(self, f: ForwardPass) -> list[Tensor]:
        """See `DiT.end`."""
        tokens = self.final_layer.modulated(f)
        layers = self.final_layer.video_out, self.final_layer.audio_out
        outs = [
            (layers[run.sound](part.float()), run)
            for part, run in zip(shares(f.sequence, tokens, f.layout.made), f.layout.made, strict=True)
        ]
        width = max(out.shape[-1] for out, _ in outs)
        padded = [functional.pad(out, (0, width - out.shape[-1])) for out, _ in outs]
        rows = f.gather(f.image, torch.cat(padded, dim=1).to(f.dtype))
        sound, video = torch.split(rows, [run.count for run in f.layout.made], dim=1)
        sound = torch.unflatten(-sound[..., : self.sound_channels], 1, (2, -1)).permute(0, 3, 1, 2)
        if f.scale != 1:
            # The velocity of what the sampler holds: the sound times the ratio of both noise levels.
            gain = _per_image(1 + (f.scale - 1) * f.sound_sigma, sound)
            sound = (1 - f.scale) * f.sound + gain * sound
        return [-f.video_grid.latent(video[..., : 4 * self.channels]), sound.contiguous()]

    @property
    def _inputs(self) -> int:
        """Numbers of a token before it is embedded, of a video or a sound."""
        return max(4 * self.channels, self.sound_channels)

    def _layout(self, arguments: Mapping[str, Any]) -> Layout:
        return Layout(arguments["context"].shape[1], arguments["x"], arguments.get("minimax_payload", {}))

    def _refined(self, context: Tensor) -> Tensor:
        """A text [B, L, context_width] as the blocks take it, [B, L, hidden]; one that was refined as it is."""
        if context.shape[-1] == self.hidden:
            return context
        refined: Tensor = self.token_refiner(self.condition_proj(context))
        return refined

    def _made_rows(self, layout: Layout, arguments: Mapping[str, Any]) -> list[Tensor | None]:
        """For sound and video, the place of each token's time among those of the masks, behind all others."""
        masks = mask_levels(arguments)
        (_, video), (_, sound) = (masks[name] for name in MASKS)
        first = TIMES + (0 if masks["denoise_mask"][0] is None else len(masks["denoise_mask"][0]))
        return [None if sound is None else first + sound, None if video is None else TIMES + video]

    def _embed(self, f: ForwardPass, chunk: Tensor, runs: Sequence[Run], dtype: torch.dtype) -> Tensor:
        """This rank's share of the tokens of some runs, [B, S, inputs] to [B, S, hidden]; computed in fp32."""
        layers = self.video_patch_proj, self.audio_patch_proj
        embedded = [
            layers[run.sound](part[..., : layers[run.sound].in_features].float())
            for part, run in zip(shares(f.sequence, chunk, runs), runs, strict=True)
        ]
        return torch.cat(embedded, dim=1).to(dtype) if embedded else chunk.new_empty(1, 0, self.hidden, dtype=dtype)

    def _conditioning(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        """What modulations are made of, for times [B, M] from 0 (noise) to 1: [B, M, time_embed_dim]."""
        if self.adaln_t_table is None:
            assert self.time_embedder is not None
            embedded: Tensor = self.time_embedder(kit.sinusoid(times, self.time_inputs))
            return functional.silu(embedded.to(dtype))
        place = times.clamp(0, 1) * (len(self.adaln_t_table) - 1)
        below = place.floor().long().clamp(max=len(self.adaln_t_table) - 2)
        table = self.adaln_t_table
        return torch.lerp(table[below], table[below + 1], (place - below)[..., None])

    def _rotation(self, places: Tensor) -> Rotation:
        """Of tokens at these places [S, 3] in fp32: time, row and column turn as many channels each."""
        if self.theta is None:
            frequencies = self.rope["inv_freq"]
        else:
            frequencies = _inverse_frequencies(self.frequencies, self.theta).to(places.device)
        angles = (places[..., None] * frequencies).flatten(1)
        return Rotation(angles.cos(), angles.sin(), halves=True)


def _inverse_frequencies(count: int, theta: float) -> Tensor:
    """As diffusers has them, fp32 on the CPU."""
    return 1.0 / theta ** (torch.arange(count, dtype=torch.float32, device="cpu") / count)


def _per_image(numbers: Tensor, latent: Tensor) -> Tensor:
    """Numbers [B] in a latent's dtype, to multiply it by."""
    return numbers.to(latent.dtype).view(-1, *[1] * (latent.ndim - 1))
