"""`loudness`, `silence`, `spectrum`: what can be said of a second of sound without weights."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from vidbatch.data import AudioGrid, Batch, Singles

if TYPE_CHECKING:
    from torch import Tensor

FLOOR_DB = -120.0
"""What digital silence is called."""


class Loudness:
    """Features of each second: `loudness_lufs`, `rms_dbfs`, `peak_dbfs`; −120 for digital silence.

    Loudness is that of ITU-R BS.1770 for one channel: the mean square behind the K filter, here
    applied to the spectrum of the window, which is periodic there; against the filter in time
    that differs by less than 0.1 dB for windows of a second. Of the mono mix.
    """

    kind = "loudness"
    audio = AudioGrid(rate_hz=48_000, window_s=Fraction(1), hop_s=Fraction(1))
    features = ("loudness_lufs", "rms_dbfs", "peak_dbfs")
    batch = 32

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B, 3) features."""
        import torch

        samples = batch.samples
        power = torch.fft.rfft(samples).abs().square()
        power[:, 1:-1] *= 2  # the half of the spectrum that is left out
        gain = torch.from_numpy(k_gain(self.audio.rate_hz, power.shape[1])).to(power.device)
        loud = (power * gain).sum(dim=1) / samples.shape[1] ** 2
        columns = [
            decibel(loud) - 0.691,
            decibel(samples.square().mean(dim=1)),
            decibel(samples.abs().amax(dim=1).square()),
        ]
        return {"features": torch.stack(columns, dim=1).clamp_(min=FLOOR_DB)}


class Silence:
    """Label `silence` for seconds whose level stays below `below_dbfs`; the score is 1."""

    kind = "silence"
    audio = AudioGrid(rate_hz=16_000, window_s=Fraction(1), hop_s=Fraction(1))
    labels = ("silence",)
    min_score = 0.5
    batch = 64

    def __init__(self, below_dbfs: float = -50.0) -> None:
        if not FLOOR_DB < below_dbfs <= 0:
            raise ValueError(f"below_dbfs is within {FLOOR_DB:g}..0")
        self.below_dbfs = below_dbfs

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B, 1) scores."""
        level = decibel(batch.samples.square().mean(dim=1))
        return {"scores": (level < self.below_dbfs).float()[:, None]}


class Spectrum:
    """Features of each second's mean power spectrum (1024 samples at 16 kHz, Hann, half overlap).

    `centroid_hz`, `rolloff_hz` (85 % of the power lies below), `flatness` (0 a tone, 1 noise), and
    `band_<n>_hz`: the level in dB of the octave that begins there. Silence has none (NaN).
    """

    kind = "spectrum"
    audio = AudioGrid(rate_hz=16_000, window_s=Fraction(1), hop_s=Fraction(1))
    bands = (62, 125, 250, 500, 1000, 2000, 4000)
    features = ("centroid_hz", "rolloff_hz", "flatness", *(f"band_{low}_hz" for low in bands))
    batch = 64

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B, 10) features."""
        import torch

        size = 1024
        window = torch.hann_window(size, device=batch.samples.device)
        parts = batch.samples.unfold(1, size, size // 2) * window
        power = torch.fft.rfft(parts).abs().square().mean(dim=1) / window.square().sum() / size
        hz = torch.arange(power.shape[1], device=power.device) * (self.audio.rate_hz / size)
        total = power.sum(dim=1)
        below = power.cumsum(dim=1) >= 0.85 * total[:, None]
        tiny = power.clamp(min=1e-20)
        columns = [
            (power * hz).sum(dim=1) / total,
            hz[below.float().argmax(dim=1)],
            tiny.log().mean(dim=1).exp() / tiny.mean(dim=1),
        ]
        for low in self.bands:
            octave = power[:, (hz >= low) & (hz < 2 * low)]
            columns.append(decibel(2 * octave.sum(dim=1)))
        found = torch.stack(columns, dim=1)
        return {"features": found.masked_fill((total <= 1e-12)[:, None], float("nan"))}


def decibel(power: Tensor) -> Tensor:
    """10·log10 of a power, FLOOR_DB at least."""
    return (power.clamp(min=1e-20).log10() * 10).clamp(min=FLOOR_DB)


@functools.cache
def k_gain(rate_hz: int, bins: int) -> Singles:
    """(bins,) power gain of BS.1770's two filters from 0 to half the rate.

    The coefficients of the recommendation are for 48 kHz, and so is this.
    """
    if rate_hz != 48_000:
        raise ValueError(f"the K filter is given for 48 kHz, not {rate_hz} Hz")
    z = np.exp(-1j * np.pi * np.linspace(0, 1, bins))
    shelf = (1.53512485958697 - 2.69169618940638 * z + 1.19839281085285 * z**2) / (
        1 - 1.69065929318241 * z + 0.73248077421585 * z**2
    )
    high_pass = (1 - 2 * z + z**2) / (1 - 1.99004745483398 * z + 0.99007225036621 * z**2)
    gain: Singles = (np.abs(shelf * high_pass) ** 2).astype(np.float32)
    return gain
