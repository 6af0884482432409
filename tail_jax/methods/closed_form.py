"""Classifiers in closed form on the features of a tower that is tuned once, or never.

    session 1    adapters and a head by cross-entropy, then the head is dropped    (`first_session`)
    every one    features z of the session's clips go into sums; the classifier is read off these

What is kept is sums over clips, so nothing is forgotten, and the order of clips and sessions does
not matter (`tail_jax/analytic`). Which classifier, and whether the tower is tuned, is the method:

    ncm      as it was    cosine with class means (SimpleCIL)
    aper     tuned        the same on [z before tuning; z] (Zhou et al., IJCV 2024)
    lda      tuned        linear discriminant with a shared covariance (streaming LDA)
    fecam    tuned        Mahalanobis distance with a covariance of each class (Goswami et al. 2023)
    acil     tuned        ridge regression on random features, gamma given (Zhuang et al. 2022)
    ranpac   tuned        the same, gamma chosen in each session (McDonnell et al. 2023)

Settings are those of the literature unless they say otherwise. ACIL tunes the whole tower in its
paper; here all that tune do it alike.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from tail_jax import analytic
from tail_jax.methods import ridge_head
from tail_jax.methods.base import Stage
from tail_jax.methods.tuned import Tuned
from tail_jax.tuning.adapters import adapter_tuning, init_adapters


@dataclasses.dataclass(frozen=True)
class ClosedForm(Tuned):
    """What these methods share; subclasses say what is kept and how classes are told apart.

    Attributes:
        learning_rate, heads_learning_rate: of adapters and head in session 1 (SGD: lit).
        first_session: duration of tuning on session 1; empty: the tower stays as it was.
        bottleneck, scale: of the adapters.
    """

    learning_rate: float = 0.01
    heads_learning_rate: float = 0.01
    weight_decay: float = 5e-4
    first_session: str = "20 epochs"
    bottleneck: int = 64
    scale: float = 0.1

    group = "adapters"
    retrieves = False

    def __post_init__(self):
        if self.bottleneck < 1:
            raise ValueError(f"method.bottleneck is {self.bottleneck}; expected 1 or more")

    def empty(self, model) -> dict[str, np.ndarray]:
        """The statistics before the first session, of the shapes that all later ones have."""
        raise NotImplementedError  # a hook without a default: every method has its own

    def learn(self, statistics: dict, z: np.ndarray, labels: np.ndarray, seed: int) -> dict:
        """The statistics with the features z [n, d] of one more session."""
        raise NotImplementedError  # a hook without a default: every method has its own

    def init_tuning(self, key, model):
        return init_adapters(key, model.audio, self.bottleneck)

    def tuning(self, model, tree):
        return {"audio": adapter_tuning(tree, self.scale)}

    def init(self, key, model, params):
        state = super().init(key, model, params) if self.first_session else {
            "trainable": {}, "aux": {}}
        return state | {"statistics": self.empty(model)}

    def resolve(self, model, trainable, frozen):
        return super().resolve(model, trainable, frozen) if trainable else (frozen, None)

    def stages(self, task, sizes):
        return (Stage(duration=self.first_session),) if self.first_session and not task else ()

    def end_task(self, state, task, data):
        z = data.map_audio(self.scores, state)
        kept = {name: np.asarray(x) for name, x in state["statistics"].items()}
        return state | {"statistics": self.learn(kept, z, data.labels, data.seed)}

    def scores(self, model, trainable, frozen, aux, batch):
        return self.pooled(model, trainable, frozen, aux, batch)


@dataclasses.dataclass(frozen=True)
class NCM(ClosedForm):
    """argmax_c cos(z, mu_c) with the tower as it was."""

    first_session: str = ""

    decision = ("counts", "sums")

    def empty(self, model):
        return analytic.empty_moments(model.classes, model.embedding, "none")

    def learn(self, statistics, z, labels, seed):
        return analytic.accumulate(statistics, z, labels)

    def decide(self, state, scores):
        return analytic.cosine_scores(_host(state), scores)


@dataclasses.dataclass(frozen=True)
class APER(NCM):
    """NCM on [f_0(x); f_1(x)], the tower before and after session 1."""

    first_session: str = "20 epochs"

    def empty(self, model):
        return analytic.empty_moments(model.classes, 2 * model.embedding, "none")

    def scores(self, model, trainable, frozen, aux, batch):
        before = model.encode("audio", frozen, None, batch)["pooled"].astype(jnp.float32)
        return jnp.concatenate(
            [before, super().scores(model, trainable, frozen, aux, batch)], axis=1)


@dataclasses.dataclass(frozen=True)
class LDA(ClosedForm):
    """z S_e^-1 mu_c^T - mu_c S_e^-1 mu_c^T / 2, S_e the covariance within classes, shrunk.

    Attributes:
        shrinkage: added to the diagonal of S, a share of its mean (ours).
    """

    shrinkage: float = 1e-4

    decision = ("weight", "bias", "counts")

    def empty(self, model):
        return analytic.empty_moments(model.classes, model.embedding, "shared") | {
            "weight": np.zeros((model.classes, model.embedding)), "bias": np.zeros(model.classes)}

    def learn(self, statistics, z, labels, seed):
        sums = {name: statistics[name] for name in ("counts", "sums", "gram")}
        sums = analytic.accumulate(sums, z, labels)
        weight, bias = analytic.linear_discriminant(sums, self.shrinkage)
        return sums | {"weight": weight, "bias": bias}

    def decide(self, state, scores):
        kept = _host(state)
        return analytic.linear_discriminant_scores(kept["weight"], kept["bias"], scores,
                                                   kept["counts"] > 0)


@dataclasses.dataclass(frozen=True)
class FeCAM(ClosedForm):
    """-(v - v_c) P_c^-1 (v - v_c)^T on unit vectors, P_c the correlation matrix of Sigma_c + a I.

    A covariance a class is kept: 4.7 MB of each at d = 768.

    Attributes:
        added: a.
    """

    added: float = 100.0

    decision = ("counts", "sums", "grams")

    def empty(self, model):
        return analytic.empty_moments(model.classes, model.embedding, "class")

    def learn(self, statistics, z, labels, seed):
        return analytic.accumulate(statistics, z, labels)

    def decide(self, state, scores):
        return analytic.fecam_scores(_host(state), scores, self.added)


@dataclasses.dataclass(frozen=True)
class ACIL(ClosedForm):
    """relu(z W_p) W, W the ridge solution over all clips; W_p ~ U(+-1/sqrt d).

    Kept as sums and solved after each session: at this gamma recursion, the form of the paper,
    would lose the digits that make the two equal.

    Attributes:
        features: M, of the random features.
        gamma: of the ridge.
    """

    features: int = 8192
    gamma: float = 1e-3

    decision = ridge_head.DECISION

    def __post_init__(self):
        super().__post_init__()
        if self.features < 1 or not self.gamma > 0:
            raise ValueError(f"method.features is {self.features} and method.gamma {self.gamma}; "
                             "expected 1 or more, and more than 0")

    def empty(self, model):
        return ridge_head.empty(model.classes, model.embedding, self.features, recursion=False)

    def learn(self, statistics, z, labels, seed):
        return ridge_head.learn(statistics, z, labels, seed, self.gamma, "uniform")

    def decide(self, state, scores):
        return ridge_head.scores(state["statistics"], scores)


@dataclasses.dataclass(frozen=True)
class RanPAC(ClosedForm):
    """relu(z W_p) W with W_p ~ N(0, 1), gamma chosen anew in each session.

    Of the powers of ten in 1e-8 .. 1e8 the one with the least square error on a fifth of the
    session's clips, fitted on the others; a session of one clip keeps the last.

    Attributes:
        features: M, of the random features.
    """

    features: int = 10_000

    decision = ridge_head.DECISION

    def __post_init__(self):
        super().__post_init__()
        if self.features < 1:
            raise ValueError(f"method.features is {self.features}; expected 1 or more")

    def empty(self, model):
        return ridge_head.empty(model.classes, model.embedding, self.features, recursion=False)

    def learn(self, statistics, z, labels, seed):
        return ridge_head.learn(statistics, z, labels, seed, chooser=lambda rows, own: (
            analytic.held_out(rows, own, seed=seed).gamma if len(own) > 1 else None))

    def decide(self, state, scores):
        return ridge_head.scores(state["statistics"], scores)


def _host(state) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in state["statistics"].items()}
