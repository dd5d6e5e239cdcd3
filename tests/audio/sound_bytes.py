"""Bytes of sound files: made with libsndfile, with FFmpeg's encoders, or byte by byte."""

import io
import struct
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

RATE = 16000
LEVEL = 0.4  # peak of all tones


def tones(hertz: Sequence[int], rate: int = RATE) -> np.ndarray:
    """A tone for each second, float32 (S,): what is in the wrong place, or missing, has another frequency."""
    time = np.arange(rate) / rate
    return np.concatenate([LEVEL * np.sin(2 * np.pi * value * time) for value in hertz]).astype(np.float32)


def noisy(hertz: Sequence[int], rate: int = RATE) -> np.ndarray:
    """Tones in some noise, which takes more bytes."""
    noise = np.random.default_rng(0).normal(0, 0.02, len(hertz) * rate)
    return tones(hertz, rate) + noise.astype(np.float32)


SCALE = tuple(range(300, 900, 100))  # hertz, of six seconds


def written(format: str, subtype: str | None = None, hertz: Sequence[int] = SCALE, rate: int = RATE, **how) -> bytes:
    """Tones as libsndfile writes them; `channels` of the same, `sound` in place of tones, other words as they are."""
    channels = how.pop("channels", 1)
    sound = how.pop("sound", None)
    sound = tones(hertz, rate) if sound is None else sound
    if channels > 1:
        sound = np.repeat(sound[:, None], channels, axis=1)
    stream = io.BytesIO()
    with soundfile.SoundFile(
        stream, "w", rate, 1 if sound.ndim == 1 else sound.shape[1], subtype, format=format, **how
    ) as file:
        for start in range(0, len(sound), rate):  # libsndfile's Vorbis cannot take much at once
            file.write(sound[start : start + rate])
    return stream.getvalue()


def encoded(
    container: str,
    codec: str,
    hertz: Sequence[int] = SCALE,
    rate: int = RATE,
    *,
    channels: int = 1,
    bit_rate: int | None = None,
    options: dict[str, str] | None = None,
    video: bool = False,
    sound: bool = True,
) -> bytes:
    """Tones as FFmpeg's encoders write them, with moving pictures beside them where wanted."""
    with tempfile.TemporaryDirectory() as folder:  # an index in front is written in a second pass over the file
        path = Path(folder) / "sound"
        with av.open(str(path), "w", format=container, options=options or {}) as file:
            pictures = _add_pictures(file) if video else None
            stream = None
            if sound:
                stream = file.add_stream(codec, rate=rate, layout="mono" if channels == 1 else "stereo")
                if bit_rate:
                    stream.bit_rate = bit_rate
            if pictures is not None:
                _encode_pictures(file, pictures)
            if stream is not None:
                _encode(file, stream, tones(hertz, rate), channels)
        return path.read_bytes()


def _add_pictures(file):
    stream = file.add_stream("mpeg4", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    return stream


def _encode_pictures(file, stream):
    for number in range(25):
        frame = av.VideoFrame.from_ndarray(np.full((96, 64), 9 * number, np.uint8), "yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, 25)
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def _encode(file, stream, sound, channels):
    context = stream.codec_context
    if not context.is_open:
        context.open()
    frame = av.AudioFrame.from_ndarray(np.repeat(sound[None], channels, axis=0), "fltp", context.layout.name)
    frame.sample_rate = context.sample_rate
    resampler = av.AudioResampler(context.format.name, context.layout.name, context.sample_rate)
    queue = av.AudioFifo()
    for piece in (*resampler.resample(frame), *resampler.resample(None)):
        piece.pts = None
        queue.write(piece)
    n_done = 0
    while queue.samples:
        piece = queue.read(context.frame_size or 1024, partial=True)
        assert piece is not None
        piece.pts, piece.time_base = n_done, Fraction(1, context.sample_rate)
        n_done += piece.samples
        file.mux(stream.encode(piece))
    file.mux(stream.encode(None))


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """Other bytes in one place."""
    return data[:at] + new + data[at + len(new) :]


def chunk(name: bytes, body: bytes, order: str = "<") -> bytes:
    """A chunk of a RIFF or IFF file."""
    return name + struct.pack(f"{order}I", len(body)) + body + b"\0" * (len(body) % 2)


LIST = chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"Lavf60.16.100\0"))


def wav(n_bytes: int | None = None, behind: bytes = b"", before: bytes = b"", sound: np.ndarray | None = None) -> bytes:
    """A WAV of 16 bits whose header announces so many bytes of samples, with chunks before and behind them."""
    samples = np.rint((tones(SCALE) if sound is None else sound) * 32767).astype("<i2").tobytes()
    announced = len(samples) if n_bytes is None else n_bytes
    body = b"WAVE" + chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)) + before
    body += b"data" + struct.pack("<I", announced) + samples + behind
    return b"RIFF" + struct.pack("<I", min(len(body), 0xFFFFFFFF)) + body


def rf64(n_bytes: int) -> bytes:
    """An RF64 whose ds64 chunk announces so many bytes of samples."""
    samples = np.rint(tones(SCALE) * 32767).astype("<i2").tobytes()
    body = b"WAVE" + chunk(b"ds64", struct.pack("<QQQI", n_bytes + 72, n_bytes, n_bytes // 2, 0))
    body += chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16))
    return b"RF64\xff\xff\xff\xff" + body + b"data\xff\xff\xff\xff" + samples


def without_xing(data: bytes) -> bytes:
    """An MP3 without the frame that announces its length."""
    at = data.find(b"Xing") if b"Xing" in data[:4096] else data.find(b"Info")
    start = data.rfind(b"\xff", 0, at)
    while data[start + 1] < 0xE0:
        start = data.rfind(b"\xff", 0, start)
    follows = data.find(data[start : start + 2], at)
    return data[follows:]


def id3(n_bytes: int) -> bytes:
    """An ID3v2 tag, as one with a picture: it holds what looks like frames."""
    size = bytes((n_bytes >> shift) & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\0\0" + size + (b"\xff\xfb\x90\x00" * (n_bytes // 4 + 1))[:n_bytes]


def without_last_page(data: bytes) -> bytes:
    """An Ogg file less its last page."""
    return data[: data.rfind(b"OggS")]


def with_serial(data: bytes) -> bytes:
    """Damage the body of a page in the middle of an Ogg file."""
    at = data.find(b"OggS", len(data) // 2) + 200
    return patched(data, at, bytes(60))


def variable_mp3(hertz: Sequence[int] = SCALE) -> bytes:
    """An MP3 of variable bit rate: silence in front, then tones in noise, so that sizes of frames differ by far."""
    rng = np.random.default_rng(0)
    sound = tones(hertz)
    sound[4 * RATE :] += rng.normal(0, 0.1, len(sound) - 4 * RATE).astype(np.float32)
    return written("MP3", sound=sound, bitrate_mode="VARIABLE", compression_level=0.2)
