"""CODA-Prompt (Smith et al., CVPR 2023), of a dual encoder and on class streams."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax.methods.pool import Pool, task_mask, with_task
from tail_jax.tuning import pools


@dataclasses.dataclass(frozen=True)
class CODAPrompt(Pool):
    """Prefixes that are weighted sums of components, in the lower layers.

        p = sum_c alpha_c P_c,      alpha_c = cos(q(x) * A_c, K_c)     (* by element)

    over the components of the tasks so far; the first half of p's tokens are keys, the second
    values. Task m trains its own components; those before are frozen, those after take no part.
    At its start its rows of A, K and P are made orthogonal to each other and to those before
    (Gram-Schmidt, unit length, by layer), and lambda_o > 0 keeps them near that:

        L = L_task + lambda_o sum over Z in {K, A, P}, layers and modalities of ||Z Z^T - I||_F^2

    In towers of 12 layers the prefixes stand in layers 0-4; with L layers in the first
    ceil(5 L / 12). These layers, the length, and on class streams 100 components in all, Adam at
    1e-3 (no weight decay) and 20 epochs are the published settings (lit). Streams of audio-text
    corpora have few tasks, of which each would get a quarter of a hundred: there it is 10 (ours).

    Attributes:
        components: of each task; 0 shares `total` out among the tasks, one each at least.
        total: of all tasks, where `components` is 0.
        length: tokens of a component, an even number.
        orthogonality: lambda_o.
        tasks: of the stream; 0 means as many as it has.
    """

    components: int = 10
    total: int = 100
    length: int = 8
    orthogonality: float = 0.0
    tasks: int = 0

    embedding_aux = ("task",)
    queries = True
    class_defaults = Pool.class_defaults | {"components": 0, "epochs": 20, "weight_decay": 0.0}

    def __post_init__(self):
        if self.components < 0 or self.length < 2 or self.length % 2:
            raise ValueError(f"method.components is {self.components} and method.length "
                             f"{self.length}; expected 0 or more, and an even number")

    @property
    def own(self) -> int:
        """Components of each task."""
        return self.components or max(self.total // max(self.tasks, 1), 1)

    def init_tuning(self, key, model):
        count = max(self.tasks, 1) * self.own

        def pool(key, tower):
            last = pools.share(tower, 5)
            keys = jax.random.split(key, 3)
            vectors = lambda key: jax.random.normal(key, (count, last, pools.query_width(tower)))
            return {"prompts": pools.init_pool(keys[0], tower, count, self.length,
                                               pools.layer_ranges(tower, 0, last)),
                    "keys": vectors(keys[1]), "attention": vectors(keys[2])}

        return {side: pool(jax.random.fold_in(key, i), getattr(model, side))
                for i, side in enumerate(model.towers)}

    def init(self, key, model, params):
        return with_task(super().init(key, model, params), 0)

    def begin_task(self, state, task, data):
        state = with_task(super().begin_task(state, task, data), task)
        first, last = task * self.own, (task + 1) * self.own

        def orthogonal(x):  # [N, layers, ...], each layer by itself
            layers = [pools.orthogonal_rows(x[:, i], first, last) for i in range(x.shape[1])]
            return jnp.stack(layers, axis=1)

        pool = jax.tree.map(orthogonal, jax.device_get(state["trainable"]["pool"]))
        return state | {"trainable": state["trainable"] | {"pool": pool}}

    def update_mask(self, state):
        own = task_mask(state, state["trainable"]["pool"], self.own)
        return super().update_mask(state) | {"pool": own}

    def _current(self, pool, aux):
        """The pool with zeros for components of later tasks, and no gradient to earlier ones."""
        def select(x):
            task = (jnp.arange(x.shape[0]) // self.own).reshape(-1, *[1] * (x.ndim - 1))
            known = jnp.where(task == aux["task"], x, jax.lax.stop_gradient(x))
            return jnp.where(task <= aux["task"], known, 0)
        return jax.tree.map(select, pool)

    def choose(self, side, model, trainable, frozen, aux, batch, training):
        pool, tower = self._current(trainable["pool"][side], aux), getattr(model, side)
        q = pools.query(side, model, frozen, batch)
        keys = pools.unit(pool["keys"])  # [N, l, d]; zeros stay zeros
        attention = pool["attention"]
        exact = {"precision": jax.lax.Precision.HIGHEST}
        dot = jnp.einsum("bd,nld->bnl", q, attention * keys, **exact)
        norm = jnp.einsum("bd,nld->bnl", q**2, attention**2, **exact)
        alpha = dot * jax.lax.rsqrt(norm + 1e-12)
        first, parts = 0, ({}, {})
        for stage, prompts in pool["prompts"].items():
            layers, half = prompts.shape[1], self.length // 2
            p = jnp.einsum("bnl,nlkd->blkd", alpha[:, :, first:first + layers], prompts, **exact)
            parts[0][stage], parts[1][stage] = p[:, :, :half], p[:, :, half:]
            first += layers
        return pools.prefix_tuning(tower, [(0, first, *parts)]), {}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        if self.orthogonality:
            pool = self._current(trainable["pool"], aux)
            term = sum(self._distance(x, aux) for x in jax.tree.leaves(pool))
            loss += self.orthogonality * term
            metrics |= {"orthogonality": term}
        return loss, metrics

    def _distance(self, x, aux):
        """sum over layers of ||Z Z^T - I||_F^2 over the components known, x [N, layers, ...]."""
        z = x.reshape(*x.shape[:2], -1)
        products = jnp.einsum("nld,mld->lnm", z, z, precision=jax.lax.Precision.HIGHEST)
        known = jnp.arange(len(x)) // self.own <= aux["task"]
        return ((products - jnp.diag(known.astype(z.dtype))) ** 2).sum()
