"""Embedding speed against transformers' CLAP in PyTorch, float32, same weights and same inputs.

The peer is used as its users do: processor and model, batches of texts padded to their longest.
Waveforms are no longer than the window, where both do the same with them.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable

import jax
import numpy as np

import tail_jax
from tail_jax.benchmarks import OURS, Comparison, Measured, Options, compare, measured

PEER = "transformers"
PEER_TEXTS = 32  # a batch; more of them would be padded more
CAPTIONS = {"full": 10_000, "tiny": 60}
_WORDS = """a the an in on at of with and while then as over near from several some loud distant
small people man woman child crowd dog cat bird birds horse sheep frog insects rain wind thunder
water waves stream fire engine car truck train motorcycle helicopter airplane bell door footsteps
gravel keyboard hammer saw drill siren alarm clock music guitar piano drum speech laughter crying
speaks talks laughs barks meows chirps sings hums rings ticks knocks bangs clanks splashes drips
flows blows rustles crackles revs idles accelerates passes approaches fades quietly loudly slowly
quickly continuously background followed by before after street forest kitchen room""".split()


def captions(count: int) -> list[str]:
    """Texts of 4 to 30 words: log-normal around 10, about as Clotho's and AudioCaps' captions."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.rint(random.lognormal(np.log(10), 0.4, count)), 4, 30).astype(int)
    return [" ".join(random.choice(_WORDS, length)) for length in lengths]


def waveforms(rate: int, seconds: list[float]) -> list[np.ndarray]:
    """Noise of these lengths, float32."""
    random = np.random.default_rng(1)
    return [(0.1 * random.standard_normal(round(rate * s))).astype(np.float32) for s in seconds]


class Peer:
    """transformers' ClapModel with its feature extractor and tokenizer, from a folder."""

    def __init__(self, folder, device: str = "cpu"):
        import torch
        import transformers
        self._torch, self._unit, self._device = torch, torch.nn.functional.normalize, device
        self.model = transformers.ClapModel.from_pretrained(folder).eval().to(device)
        self.extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def embed_audio(self, clips: list[np.ndarray]) -> np.ndarray:
        """One batch."""
        inputs = self.extractor(clips, sampling_rate=self.extractor.sampling_rate,
                                return_tensors="pt").to(self._device)
        with self._torch.inference_mode():
            return self._rows(self.model.get_audio_features(**inputs))

    def embed_text(self, texts: list[str]) -> np.ndarray:
        """Batches of `PEER_TEXTS`."""
        out = []
        for first in range(0, len(texts), PEER_TEXTS):
            inputs = self.tokenizer(texts[first:first + PEER_TEXTS], padding=True, truncation=True,
                                    return_tensors="pt").to(self._device)
            with self._torch.inference_mode():
                out.append(self._rows(self.model.get_text_features(**inputs)))
        return np.concatenate(out)

    def _rows(self, features) -> np.ndarray:
        features = getattr(features, "pooler_output", features)
        return self._unit(features, dim=-1).cpu().numpy()


def write_random_checkpoint(folder, size: str) -> None:
    """A CLAP with random weights, as transformers saves it; "full" is HTSAT-tiny, RoBERTa-base."""
    import torch
    import transformers

    from data_pipelines.text import Tokenizer
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(captions(2000), 2000)
    config = transformers.ClapConfig()
    if size == "tiny":
        config = transformers.ClapConfig(
            text_config=dict(vocab_size=2000, hidden_size=32, num_hidden_layers=2,
                             num_attention_heads=2, intermediate_size=64, projection_dim=16,
                             max_position_embeddings=66),
            audio_config=dict(spec_size=64, num_mel_bins=16, patch_embeds_hidden_size=8,
                              depths=[1, 1], num_attention_heads=[2, 2], hidden_size=16,
                              window_size=4, projection_dim=16), projection_dim=16)
    extractor = dict(truncation="rand_trunc", padding="repeatpad")
    if size == "tiny":
        extractor |= dict(feature_size=16, sampling_rate=8000, hop_length=160, max_length_s=4,
                          fft_window_size=256, frequency_min=50, frequency_max=4000)
    transformers.ClapModel(config).save_pretrained(folder)
    transformers.ClapFeatureExtractor(**extractor).save_pretrained(folder)
    tokenizer.export(folder, config.text_config.max_position_embeddings - 2)


def need_peer() -> None:
    """Raises a ValueError that says what to install, where torch or transformers are missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"this suite compares with transformers, and {error.name} is not "
                         "installed; pip install 'tail_jax[torch]'") from None


def peer_device() -> str | None:
    """Where the peer runs: on a CPU or a GPU as we do; None on a TPU, which it does not know.

    Raises:
        ValueError: torch or transformers are not installed, or torch sees no GPU where jax does.
    """
    if jax.default_backend() not in ("cpu", "gpu"):
        return None
    need_peer()
    import torch
    if jax.default_backend() == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("jax runs on a GPU and torch sees none; install a torch built for it, or "
                         "set JAX_PLATFORMS=cpu")
    return "cuda"


def run(options: Options) -> Measured:
    """Single clips and batches, texts in one batch and in many; of one length and of several.

    Raises:
        ValueError: there is no peer: torch or transformers are not installed, or this is a TPU.
    """
    device = peer_device()
    if device is None:
        raise ValueError(f"this suite compares with PyTorch, which does not run on "
                         f"{jax.devices()[0].device_kind}; expected a CPU or a GPU")
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            write_random_checkpoint(folder, options.size)
        folder = pathlib.Path(options.checkpoint or folder)
        return measured(_compare(tail_jax.load(folder), Peer(folder, device),
                                 options), options.repeats)


def _compare(ours, peer: Peer, options: Options) -> list[Comparison]:
    rate, window = ours.front_end.sampling_rate, ours.front_end.window_seconds
    one_length = waveforms(rate, [window] * 8)
    mixed = waveforms(rate, [window * part / 8 for part in range(1, 9)])
    count = options.items or CAPTIONS[options.size]
    texts = captions(count)
    lengths = peer.tokenizer(texts, return_length=True)["length"]
    common = max(set(lengths), key=lengths.count)
    equal = [text for text, length in zip(texts, lengths) if length == common][:32]
    audio = lambda clips: ours.embed_audio(clips, rate, progress=False)
    text = lambda texts: ours.embed_text(texts, progress=False)

    def one_by_one(embed: Callable, clips):
        return np.concatenate([embed([clip]) for clip in clips])

    out = []
    for name, clips in ((f"{window:g} s", one_length), (f"{window / 8:g} to {window:g} s", mixed)):
        out.append(compare(f"8 clips of {name}, one at a time", 8, options.repeats, {
            OURS: lambda: one_by_one(audio, clips),
            PEER: lambda: one_by_one(peer.embed_audio, clips)}))
        out.append(compare(f"8 clips of {name}, one call", 8, options.repeats, {
            OURS: lambda: audio(clips), PEER: lambda: peer.embed_audio(clips)}))
    out.append(compare(f"{len(equal)} captions of {common} tokens, one call", len(equal),
                       options.repeats, {OURS: lambda: text(equal),
                                         PEER: lambda: peer.embed_text(equal)}))
    # Minutes on a small machine.
    out.append(compare(f"{count} captions of {min(lengths)} to {max(lengths)} tokens", count,
                       max(1, options.repeats // 4), {OURS: lambda: text(texts),
                                                      PEER: lambda: peer.embed_text(texts)}))
    return out
