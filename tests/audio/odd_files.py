"""What is understood: kinds of sound files, whole and odd, and what becomes of each.

Unless said otherwise a file holds six seconds, with a tone of 300, 400, ... 800 Hz in each, so that what is lost, moved
or made louder shows. `ODD_FILES` is the list; each row says how long the sound is, what is said about it, or why it is
refused.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from tests.audio.sound_bytes import (
    LIST,
    RATE,
    SCALE,
    chunk,
    encoded,
    id3,
    noisy,
    patched,
    rf64,
    tones,
    variable_mp3,
    wav,
    with_serial,
    without_last_page,
    without_xing,
    written,
)

_HALF = len(SCALE) // 2  # seconds
_N = 2 * RATE * len(SCALE)  # bytes of the samples of `wav`
_CUT, _DAMAGED, _REPAIRED, _JOINED = ("truncated",), ("damaged",), ("repaired",), ("joined",)
_TWICE = (*SCALE, *SCALE)


@dataclass(frozen=True)
class OddFile:
    """A kind of file.

    Attributes:
        name: of the file, which says what it is.
        make: its bytes.
        seconds: how long its sound is, within 0.1 s; None: it is refused.
        warnings: kinds of what is said about it.
        refusal: words of the sentence with which it is refused.
        hertz: of the tone in each second; None: not known.
    """

    name: str
    make: Callable[[], bytes]
    seconds: float | None = float(len(SCALE))
    warnings: tuple[str, ...] = ()
    refusal: str = ""
    hertz: Sequence[int | None] = SCALE

    @property
    def data(self) -> bytes:
        """Its bytes, made once."""
        return _made(self.make)


@cache
def _made(make: Callable[[], bytes]) -> bytes:
    return make()


def sound_rows() -> Iterator[OddFile]:
    """Rows that can be decoded."""
    return (row for row in ODD_FILES if row.seconds is not None)


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flac(total: int | None = None, hertz: Sequence[int] = SCALE, rate: int = RATE) -> bytes:
    data = written("FLAC", hertz=hertz, rate=rate)
    if total is None:
        return data
    return patched(data, 21, bytes([data[21] & 0xF0]) + struct.pack(">I", total))


def _floats(sound: np.ndarray) -> bytes:
    return written("WAV", "FLOAT", sound=sound.astype(np.float32))


def _opposite(first: int, stop: int) -> bytes:
    left = tones(SCALE)
    right = left.copy()
    right[first * RATE : stop * RATE] *= -1
    return written("WAV", sound=np.stack([left, right], axis=1))


def _with_one(value: float) -> bytes:
    sound = tones(SCALE)
    sound[7] = value
    return _floats(sound)


def _aiff(n_bytes: int) -> bytes:
    data = written("AIFF", "PCM_16")
    return patched(data, data.find(b"SSND") + 4, struct.pack(">I", n_bytes + 8))


def _two_wavs(rate: int) -> bytes:
    return wav() + written("WAV", rate=rate)


def _mp3(hertz: Sequence[int] = SCALE, rate: int = RATE) -> bytes:
    return written("MP3", hertz=hertz, rate=rate)


def _damaged_mp3() -> bytes:
    data = _mp3()
    return patched(data, len(data) // 2, bytes(3000))


def _faststart() -> bytes:
    return encoded("mp4", "aac", options={"movflags": "+faststart"})


_W = partial(written, "WAV")

ODD_FILES: tuple[OddFile, ...] = (
    # WAV, by encoding
    OddFile("16 bit.wav", wav),
    OddFile("8 bit.wav", partial(_W, "PCM_U8")),
    OddFile("24 bit.wav", partial(_W, "PCM_24")),
    OddFile("32 bit.wav", partial(_W, "PCM_32")),
    OddFile("64 bit.wav", partial(encoded, "wav", "pcm_s64le")),
    OddFile("float.wav", partial(_W, "FLOAT")),
    OddFile("double.wav", partial(_W, "DOUBLE")),
    OddFile("a-law.wav", partial(_W, "ALAW")),
    OddFile("mu-law.wav", partial(_W, "ULAW")),
    OddFile("ima adpcm.wav", partial(_W, "IMA_ADPCM")),
    OddFile("ms adpcm.wav", partial(_W, "MS_ADPCM")),
    OddFile("gsm.wav", partial(_W, "GSM610", rate=8000)),
    OddFile("mp3 inside.wav", partial(encoded, "wav", "libmp3lame", rate=32000)),
    OddFile("extensible.wav", partial(written, "WAVEX", "PCM_24")),
    OddFile("big-endian (RIFX).wav", partial(_W, "PCM_16", endian="BIG")),
    OddFile("rf64.wav", partial(written, "RF64")),
    OddFile("wave64.w64", partial(written, "W64")),
    OddFile("six channels.wav", partial(_W, channels=6)),
    OddFile("192 kHz.wav", partial(_W, rate=192000)),
    # WAV, by length
    OddFile("of a pipe.wav", partial(wav, 0xFFFFFFFF)),
    OddFile("of a pipe, list behind.wav", partial(wav, 0xFFFFFFFF, LIST)),
    OddFile("of a recorder's pipe.wav", partial(wav, 0x80000000)),
    OddFile("of another pipe.wav", partial(wav, 0x7FFFFFFF)),
    OddFile("length 0.wav", partial(wav, 0)),
    OddFile("length 0, list behind.wav", partial(wav, 0, LIST)),
    OddFile("short length.wav", partial(wav, _N // 3), warnings=_REPAIRED),
    OddFile("short length, list behind.wav", partial(wav, _N // 3, LIST), warnings=_REPAIRED),
    OddFile("length modulo 4 GB.wav", partial(wav, 4096), warnings=_REPAIRED),
    OddFile("cut.wav", lambda: _half(wav()), _HALF, _CUT),
    OddFile("longer than it is.wav", partial(wav, 2 * _N), warnings=_CUT),
    OddFile("rf64 of a pipe.wav", partial(rf64, 0)),
    OddFile("rf64, short length.wav", partial(rf64, _N // 3), warnings=_REPAIRED),
    OddFile("short adpcm.wav", lambda: patched(_W("IMA_ADPCM"), 56, struct.pack("<I", 0)), refusal="", warnings=()),
    OddFile("cut wave64.w64", lambda: _half(written("W64")), _HALF, _CUT),
    # WAV, by what else is in it
    OddFile("list before and behind.wav", partial(wav, None, LIST, chunk(b"JUNK", bytes(5000)))),
    OddFile("zeros behind.wav", partial(wav, None, bytes(7000))),
    OddFile("id3v1 behind.wav", partial(wav, None, b"TAG" + b"a title".ljust(125))),
    OddFile("odd byte behind.wav", partial(wav, None, b"x")),
    OddFile("two wavs.wav", lambda: wav() + wav(), 12.0, hertz=_TWICE),
    OddFile("two wavs of other rates.wav", partial(_two_wavs, 44100), 12.0, _JOINED, hertz=_TWICE),
    OddFile("two data chunks.wav", lambda: wav(behind=chunk(b"data", wav()[44:])), 12.0, hertz=_TWICE),
    # Values
    OddFile("integers as floats.wav", lambda: _floats(np.rint(tones(SCALE) * 32767)), warnings=("rescaled",)),
    OddFile("24-bit integers as floats.wav", lambda: _floats(np.rint(tones(SCALE) * 8388607)), warnings=("rescaled",)),
    OddFile("scaled to integers.wav", lambda: _floats(tones(SCALE) * 32767.3), warnings=("rescaled",)),
    OddFile("a peak of 1.5.wav", partial(_with_one, 1.5)),
    OddFile("a peak of 900.wav", partial(_with_one, 900.0)),
    OddFile("opposite channels.wav", partial(_opposite, 0, 6), warnings=("out_of_phase",)),
    OddFile("opposite for a while.wav", partial(_opposite, 2, 4), warnings=("out_of_phase",)),
    OddFile("a rate that is not its own.wav", lambda: patched(wav(), 24, b"\x81"), 5.95, ("inconsistent",), hertz=()),
    OddFile("a click.wav", lambda: wav(sound=tones(SCALE)[:800]), 0.05, ("short",), hertz=()),
    # AIFF, AU, CAF and other simple formats
    OddFile("whole.aiff", partial(written, "AIFF", "PCM_24")),
    OddFile("little-endian.aifc", partial(written, "AIFF", "PCM_16", endian="LITTLE")),
    OddFile("float.aifc", partial(written, "AIFF", "FLOAT")),
    OddFile("short length.aiff", partial(_aiff, _N // 3), warnings=_REPAIRED),
    OddFile("length 0.aiff", partial(_aiff, -8)),
    OddFile("cut.aiff", lambda: _half(written("AIFF")), _HALF, _CUT),
    OddFile("whole.au", partial(written, "AU", "ULAW")),
    OddFile("of a pipe.au", lambda: patched(written("AU", "PCM_16"), 8, b"\xff" * 4)),
    OddFile("short length.au", lambda: patched(written("AU", "PCM_16"), 8, struct.pack(">I", 999)), warnings=_REPAIRED),
    OddFile("whole.caf", partial(written, "CAF", "PCM_24")),
    OddFile("apple lossless.caf", partial(encoded, "caf", "alac")),
    OddFile("creative.voc", partial(written, "VOC", "PCM_16")),
    OddFile("sphere.nist", partial(written, "NIST", "PCM_16")),
    OddFile("amiga.8svx", partial(written, "SVX", "PCM_S8")),
    OddFile("cut.8svx", lambda: _half(written("SVX", "PCM_S8")), _HALF, _CUT),
    # FLAC
    OddFile("whole.flac", _flac),
    OddFile("of a pipe.flac", partial(_flac, 0)),
    OddFile("cut.flac", lambda: _half(_flac()), 3.33, _CUT),
    OddFile("of a pipe, cut.flac", lambda: _half(_flac(0)), 3.33, _CUT),
    OddFile(
        "damaged.flac", lambda: patched(_flac(), len(_flac()) // 2, bytes(50)), 5.74, _DAMAGED, hertz=(300, 400, None)
    ),
    OddFile("two flacs.flac", lambda: _flac() + _flac(), 12.0, hertz=_TWICE),
    OddFile("two flacs of other rates.flac", lambda: _flac() + _flac(rate=8000), 12.0, _JOINED, hertz=_TWICE),
    OddFile("id3 in front.flac", lambda: id3(2000) + _flac()),
    # Ogg
    OddFile("vorbis.ogg", partial(written, "OGG", "VORBIS")),
    OddFile("opus.opus", partial(written, "OGG", "OPUS")),
    OddFile("opus of ffmpeg.opus", partial(encoded, "ogg", "libopus", rate=48000, channels=2)),
    OddFile("flac in ogg.oga", partial(encoded, "ogg", "flac")),
    OddFile("chained vorbis.ogg", lambda: written("OGG", "VORBIS") * 2, 12.0, hertz=_TWICE),
    OddFile("chained opus.opus", lambda: written("OGG", "OPUS") * 2, 12.0, hertz=_TWICE),
    OddFile(
        "chained, other rate and channels.ogg",
        lambda: written("OGG", "VORBIS") + written("OGG", "VORBIS", rate=44100, channels=2),
        12.0,
        _JOINED,
        hertz=_TWICE,
    ),
    OddFile("cut.ogg", lambda: _half(written("OGG", "VORBIS", sound=noisy(SCALE))), 1.96, _CUT),
    OddFile("without its end.opus", lambda: without_last_page(written("OGG", "OPUS")), 5.0, _CUT),
    OddFile("damaged.opus", lambda: with_serial(written("OGG", "OPUS")), 5.0, _DAMAGED, hertz=(300, 400, None)),
    # MP3
    OddFile("constant rate.mp3", _mp3),
    OddFile("constant rate, no header.mp3", lambda: without_xing(_mp3())),
    OddFile("variable rate.mp3", variable_mp3),
    OddFile("variable rate, no header.mp3", lambda: without_xing(variable_mp3())),
    OddFile("joined.mp3", lambda: _mp3() + _mp3(), 12.0, hertz=_TWICE),
    OddFile("joined, no headers.mp3", lambda: without_xing(_mp3()) * 2, 12.1, hertz=_TWICE),
    OddFile("joined, other rate.mp3", lambda: _mp3() + _mp3(rate=44100), 12.0, _JOINED, hertz=_TWICE),
    OddFile("tags around.mp3", lambda: id3(70_000) + _mp3() + b"TAG" + bytes(125)),
    OddFile("joined with tags.mp3", lambda: (id3(3000) + _mp3() + b"TAG" + bytes(125)) * 2, 12.0, hertz=_TWICE),
    OddFile("zeros in front.mp3", lambda: bytes(5000) + _mp3()),
    OddFile("cut.mp3", lambda: _half(_mp3()), 2.95, _CUT),
    OddFile("damaged.mp3", _damaged_mp3, 4.29, _DAMAGED, hertz=(300, 400, None)),
    OddFile("layer 2.mp2", partial(encoded, "mp2", "mp2", rate=44100)),
    # What only FFmpeg decodes
    OddFile("aac.m4a", partial(encoded, "ipod", "aac", rate=44100)),
    OddFile("index in front.m4a", _faststart),
    OddFile("cut, index in front.m4a", lambda: _half(_faststart()), 2.9, _CUT),
    OddFile("apple lossless.m4a", partial(encoded, "ipod", "alac")),
    OddFile("film.mp4", partial(encoded, "mp4", "aac", video=True)),
    OddFile("film.mov", partial(encoded, "mov", "pcm_s16le", video=True)),
    OddFile("adts.aac", partial(encoded, "adts", "aac")),
    OddFile("opus.webm", partial(encoded, "webm", "libopus", rate=48000)),
    OddFile("cut.webm", lambda: _half(encoded("webm", "libopus", rate=48000)), 3.17, _CUT),
    OddFile("film.mkv", partial(encoded, "matroska", "flac", video=True)),
    OddFile("windows media.wma", partial(encoded, "asf", "wmav2", rate=44100, bit_rate=64000)),
    OddFile("wavpack.wv", partial(encoded, "wv", "wavpack")),
    OddFile("true audio.tta", partial(encoded, "tta", "tta")),
    OddFile("narrow band.amr", partial(encoded, "amr", "libopencore_amrnb", rate=8000, bit_rate=12200)),
    OddFile("telephone.3gp", partial(encoded, "3gp", "libopencore_amrnb", rate=8000, bit_rate=12200)),
    OddFile("dolby.ac3", partial(encoded, "ac3", "ac3", rate=48000)),
    OddFile("film.avi", partial(encoded, "avi", "libmp3lame", rate=44100, video=True)),
    OddFile("flash.flv", partial(encoded, "flv", "aac", rate=44100)),
    OddFile("television.m2ts", partial(encoded, "mpegts", "aac", rate=48000)),
    # Refused, with a reason
    OddFile("text.wav", lambda: b"these are words\n" * 99, None, refusal="no sound found in it"),
    OddFile("playlist.mp3", lambda: b"#EXTM3U\n#EXTINF:1,\nother.mp3\n", None, refusal="no sound found in it"),
    OddFile("nothing.wav", bytes, None, refusal="0 bytes"),
    OddFile("no samples.wav", partial(wav, sound=np.zeros(0)), None, refusal="has no samples"),
    OddFile("part of a header.wav", lambda: wav()[:20], None, refusal="cannot be decoded"),
    OddFile("part of a header.flac", lambda: _flac()[:30], None, refusal="cannot be decoded"),
    OddFile("zeros.mp3", partial(bytes, 3000), None, refusal="no sound found in it"),
    OddFile("noise.wav", lambda: np.random.default_rng(0).bytes(50_000), None, refusal="no sound found in it"),
    OddFile("picture.wav", lambda: b"\x89PNG\r\n\x1a\n" + bytes(500), None, refusal="no sound found in it"),
    OddFile("silent film.mp4", partial(encoded, "mp4", "", video=True, sound=False), None, refusal="has no sound"),
    OddFile("cut, index at the end.m4a", lambda: _half(encoded("ipod", "aac")), None, refusal="its index is missing"),
    OddFile("not a number.wav", partial(_with_one, np.nan), None, refusal="not finite"),
    OddFile("damaged values.wav", partial(_with_one, 1e25), None, refusal="full scale is 1"),
    OddFile("20 Hz.wav", partial(_W, rate=20), None, refusal="announces 20 Hz"),
)
