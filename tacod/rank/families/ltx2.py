"""LTX-2, 2.3 and 2.5 (Lightricks, 2026, arXiv:2601.03233): video and sound at once.

Parameters are named as in the authors' files (Lightricks/LTX-2).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tacod.checkpoint import TensorInfo
from tacod.rank.families import kit
from tacod.rank.families.base import Method, Output
from tacod.rank.families.config import fixed, integer, number
from tacod.rank.families.inputs import Argument, Inputs, Number, Record, Spec, Unread
from tacod.rank.families.ltx2_files import LORA_NAMES, check_described, detect_config
from tacod.rank.families.ltx2_parts import Block, Connector, Kind, NormedLinear, Options
from tacod.rank.families.ltx_base import LATENTS, LTX, PATCH, flag, heads_of, numbers
from tacod.rank.families.ltx_guides import check_guides, check_times, distinct, tokens_of, varies_in_a_frame
from tacod.rank.families.ltx_parts import AdaLNSingle, Rope, latent_of
from tacod.rank.families.stream import ForwardPass, Stream
from tacod_client.errors import ArgumentError

__all__ = ["LTX2"]

_BANDS = (8, 16)
"""Channels and frequencies of a step of sound, which is a token."""
_SOUND = _BANDS[0] * _BANDS[1]
_SECONDS = (4 * 160, 16000)
"""Samples of a step of sound, and samples in a second."""
_FRAMES = 4
"""Frames of a spectrogram for each step of sound; the first step stands for one."""
_SWITCHES = ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn")
_PREPARED: Mapping[str, Spec] = {
    "ref_tokens": Argument(("B", "R", _SOUND), required=False, shared=True),
    "prompt_times": Argument(("B", 2), required=False, fp32=True),
}


class LTX2(LTX):
    """Text and pictures to video with sound, with keyframes, guides and a reference's voice; see `LTX`."""

    family: ClassVar[str] = "ltxav"
    title = "LTX-2"
    models = ("2", "2.3", "2.5")
    image_models: ClassVar[tuple[str, ...]] = ("ltxav",)
    latent_format = (LATENTS, LATENTS)
    lora_names = LORA_NAMES
    lora_marks = r"transformer_blocks[._]\d+[._](audio_(attn[12]|ff|to_video_attn)|video_to_audio_attn)[._]"
    tiny: ClassVar[Mapping[str, Any]] = {
        "image_model": "ltxav",
        "num_layers": 2,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "cross_attention_dim": 48,
        "in_channels": 4,
        "caption_channels": 16,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 32,
        "causal_temporal_positioning": True,
        "use_middle_indices_grid": True,
        "av_ca_timestep_scale_multiplier": 1000.0,
        "rope_type": "split",
        "frequencies_precision": "float64",
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
        "caption_projection_first_linear": False,
        "connector_num_attention_heads": 3,
        "connector_attention_head_dim": 16,
        "connector_num_layers": 1,
        "connector_apply_gated_attention": True,
        "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 8,
        "ff_bias": False,
        "use_keyframes_abs_pos_embedding": True,
    }
    usual: ClassVar[Mapping[str, int]] = {"B": 1, "T": 16, "H": 22, "W": 40, "S": 126, "L": 1024}

    def __init__(self, config: Mapping[str, Any]) -> None:
        check_described(config)
        super().__init__(config)
        fixed(config, audio_in_channels=_SOUND, use_prompt_adaln_single=True)
        heads, head_width = heads_of(config, "audio_num_attention_heads", 32, "audio_attention_head_dim", 64)
        self.sound_width = sound_width = heads * head_width
        what = "audio_num_attention_heads times audio_attention_head_dim"
        self.same_width(config, "audio_cross_attention_dim", 2048, sound_width, what)
        gated, width, halves = flag(config, "apply_gated_attention"), self.width, self.rope_kind["halves"]
        kind = Kind(
            *(width, self.heads, self.head_width, sound_width, heads, head_width, gated, self.adaptive),
            bias=self.ff_bias,
            sound_bias=flag(config, "audio_ff_bias", True),
        )
        longest = numbers(config, "audio_positional_embedding_max_pos", [20])
        middle = flag(config, "use_middle_indices_grid")
        self.sound_rope = Rope(heads, head_width, longest, middle=middle, **self.rope_kind)
        longest = [max(longest[0], self.lengths_of_axes[0])]
        self.cross_rope = Rope(heads, head_width, longest, middle=True, **self.rope_kind)
        self.cross_factor = number(config, "av_ca_timestep_scale_multiplier", 1.0) / self.multiplier

        self.audio_patchify_proj = nn.Linear(_SOUND, sound_width)
        self.audio_adaln_single = AdaLNSingle(sound_width, kind.rows)
        self.prompt_adaln_single = AdaLNSingle(width, 2) if self.adaptive else None
        self.audio_prompt_adaln_single = AdaLNSingle(sound_width, 2) if self.adaptive else None
        self.av_ca_video_scale_shift_adaln_single = AdaLNSingle(width, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLNSingle(width, 1)
        self.av_ca_audio_scale_shift_adaln_single = AdaLNSingle(sound_width, 4)
        self.av_ca_v2a_gate_adaln_single = AdaLNSingle(sound_width, 1)
        self._add_text(config, halves)
        self.transformer_blocks = nn.ModuleList(
            Block(kind, at) for at in range(integer(config, "num_layers", 48, most=1024))
        )
        self.audio_scale_shift_table = kit.drawn(2, sound_width)
        self.audio_proj_out = nn.Linear(sound_width, _SOUND)

    def _add_text(self, config: Mapping[str, Any], halves: bool) -> None:
        """The connectors, and the projections before them or in the forward."""
        self.connects_projected = flag(config, "caption_proj_before_connector")
        projects = not self.connects_projected or flag(config, "caption_projection_first_linear", True)

        def projection(width: int) -> nn.Module:
            if not projects:
                return nn.Identity()
            if self.connects_projected:
                return NormedLinear(self.caption_width, width)
            return kit.MLP(self.caption_width, width, ("linear_1", "linear_2"), outputs=width)

        self.caption_projection = projection(self.width)
        self.audio_caption_projection = projection(self.sound_width)
        heads, each = heads_of(config, "connector_num_attention_heads", 30, "connector_attention_head_dim", 128)
        sound = heads_of(
            config, "audio_connector_num_attention_heads", heads, "audio_connector_attention_head_dim", each
        )
        more: dict[str, Any] = {
            "layers": integer(config, "connector_num_layers", 2, most=1024),
            "gated": flag(config, "connector_apply_gated_attention"),
            "halves": halves,
        }
        self.video_embeddings_connector = Connector(heads, each, **more)
        self.audio_embeddings_connector = Connector(*sound, **more)
        self.text_widths = [self.caption_width] * 2 if not self.connects_projected else [self.width, self.sound_width]

    @classmethod
    def detect(cls, tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
        """See `DiT.detect`; the rest is in the file's metadata. There are 32 heads of each kind."""
        return detect_config(tensors) if "audio_adaln_single.linear.weight" in tensors else None

    def arguments(self) -> dict[str, Spec]:
        """See `DiT.arguments` and `LTX.video_arguments`.

        ``x`` is a list of a video and a sound of S steps, or of a video alone; ``timestep`` has one for each, also
        where there is no sound. ``ref_audio`` are tokens of a sound whose voice the new one is to have. The switches
        and ``stg_self_attn_blocks`` leave parts out, for guidance; ``reads_video`` says which video the sound attends
        to: before or after that has attended to the sound.
        """
        sound = ("B", _BANDS[0], "S", _BANDS[1])
        return {
            "x": Argument(("B", self.channels, "T", "H", "W"), many=True, others=(sound,), fewest=1),
            "timestep": Argument(("B",), fp32=True, many=True, others=(("B",),), per=("N", 1)),
            "context": Argument(("B", "L", sum(self.text_widths))),
            "attention_mask": Argument(("B", "L"), required=False, keys=True),
            **self.video_arguments(),
            "audio_denoise_mask": Unread(),
            "ref_audio": Record({"tokens": Argument(("B", "R", _SOUND), shared=True)}),
            **{name: Argument(None, required=False, choices=(False, True)) for name in _SWITCHES},
            "stg_self_attn_blocks": Number(0, 1 << 16, many=True),
            "reads_video": Argument(None, required=False, choices=("after", "before")),
        }

    def methods(self) -> Mapping[str, Method]:
        """See `DiT.methods`: what makes contexts of a text encoder's states, as `LTX2.preprocess` does."""
        both = self.width + self.sound_width
        split = [each.width for each in self._connectors] == [self.width, self.sound_width]
        states = both if split and not isinstance(self.caption_projection, NormedLinear) else self.caption_width
        context = Argument(("B", "L", states), widths=(both, 2 * self.caption_width))
        unprocessed = Argument(None, required=False, choices=(False, True))
        return {"preprocess_text_embeds": Method({"context": context, "unprocessed": unprocessed}, self.preprocess)}

    @property
    def _connectors(self) -> tuple[Connector, Connector]:
        return self.video_embeddings_connector, self.audio_embeddings_connector

    def preprocess(self, context: Tensor, unprocessed: bool = False) -> Tensor:
        """States of a text encoder [B, L, W] as a context [B, L', W'] of both streams, side by side.

        What is of a context's width is one already, unless ``unprocessed``. Raises `ArgumentError` for another width
        than this model's encoder has.
        """
        both = [self.width, self.sound_width]
        width = context.shape[-1]
        if not unprocessed and width in (sum(both), 2 * self.caption_width):
            return context
        texts: Sequence[Tensor] = [context, context] if width != sum(both) else torch.split(context, both, dim=-1)
        connectors = self._connectors
        wanted = [each.width for each in connectors]
        if isinstance(self.caption_projection, NormedLinear):
            wanted = [self.caption_width] * 2
        if [text.shape[-1] for text in texts] != wanted:
            raise ArgumentError(
                f"context: its tokens are {width} wide, which this model's connectors can't take; use the text encoder "
                "that belongs to the model",
                argument="context",
            )
        if self.connects_projected:
            texts = [self.caption_projection(texts[0]), self.audio_caption_projection(texts[1])]
        return torch.cat([connect(text) for connect, text in zip(connectors, texts, strict=True)], dim=-1)

    def lengths(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """See `DiT.lengths`. Texts and sound are whole on every rank, so they are no streams."""
        check_guides(arguments)
        video, *sound = arguments["x"]
        self.check_markers(arguments, video)
        tokens = kit.Grid(video, PATCH).length
        steps = sound[0].shape[2] if sound else 1
        reference = (arguments.get("ref_audio") or {}).get("tokens")
        if reference is not None and not sound:
            raise ArgumentError(
                "ref_audio: it is a voice for a sound, but x is a video alone; give x a sound too, or leave it out",
                argument="ref_audio",
            )
        if reference is not None and reference.shape[0] not in (1, video.shape[0]):
            raise ArgumentError(
                f"ref_audio.tokens: it is for {reference.shape[0]} images, but x has {video.shape[0]}; make it 1",
                argument="ref_audio.tokens",
            )
        for each, count in zip(arguments.get("timestep") or (), (tokens, steps), strict=False):
            check_times(each, count)
        return (arguments.get("tokens") or tokens,)

    def output_shapes(self, latents: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """See `DiT.output_shapes`."""
        return list(latents)

    def prepare_tokens(self, inputs: Inputs) -> Inputs:
        """See `LTX.prepare_tokens`; of the timesteps the largest are found too."""
        if "tokens" in inputs:
            return inputs
        video, *sound = inputs["x"]
        times, heard = (each.reshape(len(each), -1) for each in inputs["timestep"])
        kept, changes = tokens_of(inputs, video)
        rows = times
        if times.shape[1] > 1 and not varies_in_a_frame(inputs.get("denoise_mask")):
            # Then ComfyUI takes the first token's for all of a frame.
            frames = torch.unflatten(times, 1, (video.shape[2], -1))
            rows = frames[:, :, :1].expand_as(frames).flatten(1)
        if kept is not None:
            times, rows = (each[:, kept] if each.shape[1] > 1 else each for each in (times, rows))
        reference = (inputs.get("ref_audio") or {}).get("tokens") if sound else None
        if reference is not None:
            heard = heard.expand(-1, sound[0].shape[2])
            heard = torch.cat((heard.new_zeros(len(heard), reference.shape[1]), heard), dim=1)
        peaks = torch.stack((times.amax(dim=1), heard.amax(dim=1)), dim=1)
        video_times, changes["rows"] = distinct(rows)
        sound_times, changes["sound_rows"] = distinct(heard)
        changes |= {"timestep": [video_times, sound_times], "prompt_times": peaks, "gate_times": peaks.amax(dim=0)}
        changes |= {"ref_audio": None, "ref_tokens": reference}
        return Inputs({**inputs, **changes}, {**inputs.specs, **_PREPARED})

    @property
    def has_prefix(self) -> bool:
        """See `DiT.has_prefix`: models whose texts the time doesn't modulate have one."""
        return not self.adaptive

    def prefix(self, f: ForwardPass, **arguments: Any) -> list[Tensor]:
        """See `DiT.prefix`: keys and values of the video's text in each block, and of the sound's if there is one."""
        text, sound_text = self._texts(arguments["context"])
        found: list[Tensor] = []
        for block in f.over(self.trunk):
            found += block.attn2.keys_values(text)
            if len(arguments["x"]) > 1:
                found += block.audio_attn2.keys_values(sound_text)
        return found

    def _texts(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What video and sound attend to, [B, L, width] each."""
        text, sound_text = torch.split(context, self.text_widths, dim=-1)
        if self.connects_projected:
            return text, sound_text
        return self.caption_projection(text), self.audio_caption_projection(sound_text)

    def begin(self, f: ForwardPass, **arguments: Any) -> None:
        """See `DiT.begin`."""
        video, *sound = arguments["x"]
        times, heard = arguments["timestep"]
        dtype, multiplier = video.dtype, self.multiplier
        stg = arguments.get("stg_self_attn_blocks") or ()
        video_on, sound_on, to_video, to_sound = (bool(arguments.get(name, True)) for name in _SWITCHES)
        before = arguments.get("reads_video") == "before"
        unattended = frozenset(int(number) for number in stg if number % 1 == 0)
        f.options = Options(video_on, sound_on, to_video, to_sound, before, unattended)
        f.text, f.sound_text = self._texts(arguments["context"])
        f.text_mask = arguments.get("attention_mask")
        readers = [(block.attn2, block.audio_attn2)[: len(arguments["x"])] for block in self.trunk if not self.adaptive]
        f.texts = self.texts_of(f, itertools.chain(*readers))
        self.begin_video(f, video, times, arguments)
        f.prompt_times = f.sound_prompt_times = None
        prompts = arguments["prompt_times"] * multiplier
        if self.prompt_adaln_single is not None and self.audio_prompt_adaln_single is not None:
            f.prompt_times = self.prompt_adaln_single.modulations(prompts[:, :1], dtype)[0]
            f.sound_prompt_times = self.audio_prompt_adaln_single.modulations(prompts[:, 1:], dtype)[0]
        f.sound, f.sound_times = None, None
        if sound:
            self._begin_sound(f, sound[0], heard * multiplier, arguments)

    def _begin_sound(self, f: ForwardPass, sound: Tensor, times: Tensor, arguments: Mapping[str, Any]) -> None:
        """Make ``f.sound``, which every rank has whole, of a sound and its tokens' distinct timesteps [B, M]."""
        dtype, reference = sound.dtype, arguments.get("ref_tokens")
        tokens = sound.transpose(1, 2).flatten(2)
        spans = _seconds(tokens.shape[1], sound.device)
        f.before = 0
        if reference is not None:
            f.before = reference.shape[1]
            tokens = torch.cat((reference.expand(len(tokens), -1, -1), tokens), dim=1)
            # The reference ends one step before the sound begins. A last bit in fp32 is a thousandth of a turn here.
            ends = _seconds(f.before, torch.device("cpu"))[-1, 1].item() + _SECONDS[0] / _SECONDS[1]
            spans = torch.cat((_seconds(f.before, sound.device) - ends, spans))
        spans = spans[None, :, None]
        rows = arguments.get("sound_rows")
        embedded = self.audio_patchify_proj(tokens)
        f.sound = Stream(embedded, (tokens.shape[1],), self.sound_rope(spans), rows, whole=True)
        f.outputs = (f.image, f.sound)
        f.cross_rotation = self.cross_rope(f.spans[:, :, :1])
        f.sound_cross_rotation = self.cross_rope(spans)
        f.sound_times, f.sound_embedded = self.audio_adaln_single.modulations(times, dtype)
        f.cross_times = self.av_ca_video_scale_shift_adaln_single.modulations(f.video_times, dtype)[0]
        f.sound_cross_times = self.av_ca_audio_scale_shift_adaln_single.modulations(times, dtype)[0]
        seen, heard = (arguments["gate_times"] * self.multiplier * self.cross_factor).split(1)
        f.gate_times = self.av_ca_a2v_gate_adaln_single.modulations(heard[None], dtype)[0]
        f.sound_gate_times = self.av_ca_v2a_gate_adaln_single.modulations(seen[None], dtype)[0]

    def end(self, f: ForwardPass) -> Output:
        """See `DiT.end`."""
        video = self.end_video(f)
        if f.sound is None:
            return [video]
        tokens = latent_of(f.sound, self.audio_scale_shift_table, f.sound_embedded, self.audio_proj_out)
        return [video, torch.unflatten(tokens[:, f.before :], -1, _BANDS).transpose(1, 2)]


def _seconds(steps: int, device: torch.device) -> Tensor:
    """When each of some steps of sound begins and ends, fp32 [S, 2]."""
    frames = torch.arange(steps + 1, dtype=torch.float32, device=device) * _FRAMES
    at = (frames + 1 - _FRAMES).clip(min=0) * (_SECONDS[0] // _FRAMES) / _SECONDS[1]
    return torch.stack((at[:-1], at[1:]), dim=-1)
