"""The log-mel front end by TensorFlow's operations, with which that in NumPy is compared."""

import math

import numpy as np

from data_pipelines import load_tensorflow
from data_pipelines.log_mel import window_and_filters


def tensorflow_log_mel(waveform, settings, valid=None) -> np.ndarray:
    """As `data_pipelines.log_mel.log_mel`, all frames at once and with full filters."""
    tf = load_tensorflow()
    waveform = np.asarray(waveform, np.float64)
    if settings.padding:
        waveform = np.pad(waveform, settings.padding, mode=settings.pad_mode)
    window, filters = window_and_filters(settings)
    frames = tf.signal.frame(waveform, settings.frame_length, settings.hop_length)
    if settings.remove_dc:
        frames -= tf.reduce_mean(frames, axis=-1, keepdims=True)
    if settings.preemphasis:
        before = tf.concat([frames[..., :1], frames[..., :-1]], axis=-1)
        frames -= settings.preemphasis * before
    spectrum = tf.signal.rfft(frames * window, [settings.n_fft])
    power = tf.math.real(spectrum) ** 2 + tf.math.imag(spectrum) ** 2
    mel = tf.math.log(tf.maximum(tf.tensordot(power, filters, axes=1), settings.floor)).numpy()
    if settings.log == "db":
        mel *= 10.0 / math.log(10.0)
    if valid is not None and settings.fill == "frames":
        ends = np.arange(len(mel)) * settings.hop_length + settings.frame_length
        mel[ends > valid] = 0
    if settings.frames is not None:
        mel = np.pad(mel[: settings.frames], ((0, max(settings.frames - len(mel), 0)), (0, 0)))
    return mel.astype(np.float32)
