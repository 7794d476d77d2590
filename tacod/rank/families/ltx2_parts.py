"""What LTX-2's network is made of beside LTX-Video's parts: blocks of video and sound, and the connectors of texts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tacod.rank.families import kit
from tacod.rank.families.ltx_parts import RMS, CrossAttention, Rope, SelfAttention, feed_forward
from tacod.rank.families.stream import ForwardPass, Stream
from tacod.rank.ops.norm import rms_norm
from tacod.rank.ops.qkv import Rotation

__all__ = ["Block", "Connector", "Kind", "NormedLinear", "Options"]

_REGISTERS = 128
_LEAST_TEXT = 1024
_POSITIONS = 4096.0


@dataclass(frozen=True)
class Kind:
    """Widths and parts that all blocks have."""

    width: int
    heads: int
    head_width: int
    sound_width: int
    sound_heads: int
    sound_head_width: int
    gated: bool
    """Whether attentions have gates."""
    adaptive: bool
    """Whether the attention to the text is modulated."""
    bias: bool
    """Whether the video's MLP has biases."""
    sound_bias: bool

    @property
    def rows(self) -> int:
        """Modulations of a stream in a block."""
        return 9 if self.adaptive else 6


@dataclass(frozen=True)
class Options:
    """What a forward computes of each block; all of it unless a guidance wants a difference."""

    video: bool = True
    sound: bool = True
    sound_to_video: bool = True
    video_to_sound: bool = True
    reads_before: bool = False
    """Whether sound attends to the video as it was before it attended to the sound: ComfyUI up to 0.30."""
    unattended: frozenset[int] = frozenset()
    """Blocks in which a token's own value stands for what it would attend to among its like."""


class Block(nn.Module):
    """Video and sound: each attends to itself, to its text and to the other one."""

    def __init__(self, kind: Kind, number: int) -> None:
        super().__init__()
        self.kind, self.number = kind, number
        video, sound = (
            (kind.width, kind.heads, kind.head_width),
            (kind.sound_width, kind.sound_heads, kind.sound_head_width),
        )
        gated, across = kind.gated, (kind.sound_heads, kind.sound_head_width)
        self.attn1, self.audio_attn1 = SelfAttention(*video, gated=gated), SelfAttention(*sound, gated=gated)
        self.attn2, self.audio_attn2 = CrossAttention(*video, gated=gated), CrossAttention(*sound, gated=gated)
        self.audio_to_video_attn = CrossAttention(kind.width, *across, kind.sound_width, gated)
        self.video_to_audio_attn = CrossAttention(kind.sound_width, *across, kind.width, gated)
        self.ff, self.audio_ff = feed_forward(kind.width, kind.bias), feed_forward(kind.sound_width, kind.sound_bias)
        self.scale_shift_table = kit.drawn(kind.rows, kind.width)
        self.audio_scale_shift_table = kit.drawn(kind.rows, kind.sound_width)
        self.prompt_scale_shift_table = self.audio_prompt_scale_shift_table = None
        if kind.adaptive:
            self.prompt_scale_shift_table = kit.drawn(2, kind.width)
            self.audio_prompt_scale_shift_table = kit.drawn(2, kind.sound_width)
        self.scale_shift_table_a2v_ca_audio = kit.drawn(5, kind.sound_width)
        self.scale_shift_table_a2v_ca_video = kit.drawn(5, kind.width)

    def forward(self, f: ForwardPass) -> None:
        """Both one block further; every rank has all of the sound, and computes all of it."""
        options: Options = f.options
        sound, own = f.sound is not None and options.sound, self.number in options.unattended
        video = (self.scale_shift_table.flatten() + f.times).chunk(self.kind.rows, dim=-1)
        heard: tuple[Tensor, ...] = ()
        if sound:
            heard = (self.audio_scale_shift_table.flatten() + f.sound_times).chunk(self.kind.rows, dim=-1)
        attention = None
        if options.video:
            normed = f.image.normed(*video[:2], norm=RMS)
            if not own:
                mine = (f.image, lambda: self.attn1(normed, f.image.rotation))
                attention = f.attend(mine, mask=f.bias, overlap=sound)
        if sound:
            # While the video's heads travel.
            self._hear(f, heard, own)
        if options.video:
            attended = self.attn1.to_v(normed) if attention is None else attention.wait()[0]
            f.image.add(video[2], self.attn1.out(attended, normed))
            table, prompt = self.prompt_scale_shift_table, f.prompt_times
            self._read(f, f.image, self.attn2, f.text, video[6:], table, prompt)
        if f.sound is not None:
            self._exchange(f, options, sound)
        if options.video:
            f.image.add(video[5], self.ff(f.image.normed(*video[3:5], norm=RMS)))
        if sound:
            f.sound.add(heard[5], self.audio_ff(f.sound.normed(*heard[3:5], norm=RMS)))

    def _hear(self, f: ForwardPass, parts: tuple[Tensor, ...], own: bool) -> None:
        """The sound attends to itself and to its text."""
        attention, normed = self.audio_attn1, f.sound.normed(*parts[:2], norm=RMS)
        attended = attention.to_v(normed) if own else attention.attend_whole(normed, f.sound.rotation)
        f.sound.add(parts[2], attention.out(attended, normed))
        table, prompt = self.audio_prompt_scale_shift_table, f.sound_prompt_times
        self._read(f, f.sound, self.audio_attn2, f.sound_text, parts[6:], table, prompt)

    @staticmethod
    def _read(
        f: ForwardPass,
        stream: Stream,
        attention: CrossAttention,
        text: Tensor,
        parts: tuple[Tensor, ...],
        table: Tensor | None,
        prompt: Tensor | None,
    ) -> None:
        """A stream attends to its text, which ``table`` and ``prompt`` modulate where there are ``parts``."""
        if table is None or prompt is None:
            keys, values = f.texts[attention]
            stream.add(None, attention.attend(stream.normed(norm=RMS), keys, values, f.text_mask))
            return
        shift, scale, gate = parts
        text_shift, text_scale = (table.flatten() + prompt).chunk(2, dim=-1)
        text = torch.addcmul(text_shift, text, 1 + text_scale)
        keys, values = attention.keys_values(text)
        stream.add(gate, attention.attend(stream.normed(shift, scale, norm=RMS), keys, values, f.text_mask))

    def _exchange(self, f: ForwardPass, options: Options, sound: bool) -> None:
        """The video attends to the sound, then the sound to the video."""
        to_video, to_sound = options.video and options.sound_to_video, sound and options.video_to_sound
        table, sound_table = self.scale_shift_table_a2v_ca_video, self.scale_shift_table_a2v_ca_audio
        seen = (table[:4].flatten() + f.cross_times).chunk(4, dim=-1)
        heard = (sound_table[:4].flatten() + f.sound_cross_times).chunk(4, dim=-1)
        # Of both, first the scale and then the shift, for the video's attention and for the sound's.
        before = f.image.normed(seen[3], seen[2], norm=RMS) if to_sound and options.reads_before else None
        if to_video:
            attention, x = self.audio_to_video_attn, f.image.normed(seen[1], seen[0], norm=RMS)
            context = f.sound.normed(heard[1], heard[0], norm=RMS)
            keys, values = attention.keys_values(context, rotation=f.sound_cross_rotation)
            queries = attention.queries(x, f.cross_rotation)
            attended = attention.out(kit.attend_replicated(queries, keys, values, attention.heads), x)
            f.image.add(_for_rows(table[4] + f.gate_times, f.cross_times), attended)
        if to_sound:
            attention = self.video_to_audio_attn
            x = f.sound.normed(heard[3], heard[2], norm=RMS)
            context = f.image.normed(seen[3], seen[2], norm=RMS) if before is None else before
            keys, values = attention.keys_values(context, rotation=f.cross_rotation)
            queries = attention.queries(x, f.sound_cross_rotation)
            attended = kit.attend_sharded(f.sequence, queries, keys, values, attention.heads)
            f.sound.add(_for_rows(sound_table[4] + f.sound_gate_times, f.sound_cross_times), attention.out(attended, x))


def _for_rows(gate: Tensor, times: Tensor) -> Tensor:
    """A gate [1, 1, W] with as many rows as there are timesteps [B, M, ...]."""
    return gate.expand(-1, times.shape[1], -1)


class NormedLinear(nn.Module):
    """A text's projection: an RMS norm without weights, scaled by the widths, and a linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self._scale = (outputs / inputs) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, inputs] to [B, L, outputs]."""
        out: Tensor = self.linear_1(rms_norm(x, None, 1e-6) * self._scale)
        return out


class _ConnectorBlock(nn.Module):
    """Self-attention and GELU over a text."""

    def __init__(self, width: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.attn1 = SelfAttention(width, heads, width // heads, gated=gated)
        self.ff = feed_forward(width)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[B, L, width] to the same shape."""
        normed = rms_norm(x, None, RMS.epsilon)
        x = x + self.attn1.out(self.attn1.attend_whole(normed, rotation), normed)
        out: Tensor = x + self.ff(rms_norm(x, None, RMS.epsilon))
        return out


class Connector(nn.Module):
    """What makes a text encoder's states a context: blocks over the text, filled up with learned registers.

    Args:
        heads: Attention heads.
        head_width: Channels of a head.
        layers: Blocks.
        gated: Whether attentions have gates.
        halves: As in `Rope`.
    """

    def __init__(self, heads: int, head_width: int, layers: int, *, gated: bool, halves: bool) -> None:
        super().__init__()
        self.width = heads * head_width
        self.learnable_registers = kit.drawn(_REGISTERS, self.width)
        self.transformer_1d_blocks = nn.ModuleList(_ConnectorBlock(self.width, heads, gated) for _ in range(layers))
        self._rope = Rope(heads, head_width, [_POSITIONS], double=True, middle=False, halves=halves)

    def forward(self, text: Tensor) -> Tensor:
        """States [B, L, width] to a context [B, L', width] of at least 1024 tokens, a multiple of 128 of them."""
        batch, length, _ = text.shape
        repeats = -(-max(_LEAST_TEXT, length) // _REGISTERS)
        registers = self.learnable_registers.to(text.dtype).repeat(repeats, 1)[length:]
        x = torch.cat((text, registers.expand(batch, -1, -1)), dim=1)
        starts = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
        rotation = self._rope(starts[None, :, None, None].expand(-1, -1, -1, 2))
        for block in self.transformer_1d_blocks:
            x = block(x, rotation)
        return rms_norm(x, None, RMS.epsilon)
