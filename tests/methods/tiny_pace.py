"""A stream for PACE in miniature: four sessions of six classes, of which two tune a tower of three
blocks, and a trainer that keeps the states of a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.methods.pace import HEAD
from tail_jax.models.ast import ASTConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.training import sharding
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer
from tail_jax.training.step import cast_frozen, make_train_step
from tail_jax.training.task_data import TaskData

LAYERS, WIDTH, CLASSES, BATCH = 3, 8, 6, 4
TOWER = {"frames": 16, "mels": 8, "patch": 4, "width": WIDTH, "layers": LAYERS, "heads": 2,
         "hidden": 12}
MODEL = DualEncoder(EATConfig(**TOWER), None, classes=CLASSES)
SESSIONS = ((0, 3), (5, 2), (1,), (4,))  # classes in no order
SIZES = (7, 6, 5, 6)
SETTINGS = {"rank": 2, "features": 24, "copies": 5, "reg_copies_per_step": 5, "wrong_share": 0.0,
            "boundary_capacity": 12, "n_stop": 12, "layer_threshold": 0.9995, "margin": 1.0}


@functools.cache
def params(kind="eat"):
    model = MODEL if kind == "eat" else AST
    tree = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    random = np.random.default_rng(8)  # kernels of some size, so that little training moves much
    encoder = jax.tree.map(lambda x: x + random.normal(0, 0.2, x.shape).astype(np.float32),
                           tree["audio"]["encoder"])
    return tree | {"audio": tree["audio"] | {"encoder": encoder}}


AST = DualEncoder(ASTConfig(stride=4, **TOWER), None, classes=CLASSES)


class Reader:
    """The clips of one session: each class a pattern, each clip noise."""

    def __init__(self, session):
        random = np.random.default_rng(session)
        own = np.array(SESSIONS[session])
        self.labels = own[np.arange(SIZES[session]) % len(own)].astype(np.int32)
        patterns = np.random.default_rng(99).normal(size=(CLASSES, 16, 8))
        noise = random.normal(size=(SIZES[session], 16, 8))
        self.audio = (-4 + 9 * (patterns[self.labels] + noise)).astype(np.float32)

    def audio_batches(self, size, training=False, rows=None):
        for start in range(0, len(self.labels), size):
            rows = np.arange(start, min(start + size, len(self.labels)))
            pad = lambda x: np.concatenate([x[rows], np.zeros((size - len(rows), *x.shape[1:]),
                                                              x.dtype)])
            yield {"audio": pad(self.audio), "label": pad(self.labels),
                   "clip_id": pad(np.arange(len(self.labels), dtype=np.int32)),
                   "mask": np.arange(size) < len(rows)}


def data_of(session, hook, frozen, model=MODEL, batch_size=BATCH):
    key = jax.random.fold_in(jax.random.key(3), 10 * session + hook)
    return TaskData(model, frozen, Reader(session), key, 100 + session, batch_size,
                    sharding.make_mesh(1, 1))


def with_classes(state, session):
    on = lambda sessions: jnp.asarray(np.isin(np.arange(CLASSES), np.concatenate(sessions)))
    return state | {"aux": state["aux"] | {"classes": {
        "current": on(SESSIONS[session:session + 1]), "seen": on(SESSIONS[:session + 1])}}}


def run(method, sessions, model=MODEL, kind="eat", epochs=4):
    """All states of a run, by (session, 'start' | stage name | 'end'), and the train step."""
    mesh = sharding.make_mesh(1, 1)
    frozen = sharding.place(cast_frozen(method.frozen(params(kind)), "float32"), mesh)
    state = method.init(jax.random.key(1), model, params(kind))
    copied = lambda tree: jax.tree.map(lambda x: jnp.array(x), tree)
    config = OptimizerConfig(kind="sgd", clip=5.0, warmup=0.0)
    optimizer = make_optimizer(config, method, state["trainable"])
    step = make_train_step(model, method, optimizer, mesh, state["trainable"], frozen)
    here, seen = sharding.replicated(mesh), {}
    place = lambda state: state | {
        "trainable": jax.device_put(copied(state["trainable"]), here),
        "aux": jax.device_put(copied(state["aux"]), here)}
    for session in range(sessions):
        data = functools.partial(data_of, session, frozen=frozen, model=model)
        state = place(method.begin_task(with_classes(state, session), session, data(hook=0)))
        seen[session, "start"] = state
        for number, stage in enumerate(method.stages(session, SIZES[:session + 1])):
            state = place(method.begin_stage(state, session, number, data(hook=2 + 2 * number)))
            seen[session, stage.name, "begin"] = place(state)
            trainable = state["trainable"]
            opt_state, mask = step.init_optimizer(trainable), method.update_mask(state)
            total, count = (1 if stage.name == HEAD else epochs), 0
            batches = [sharding.put_batch(b, mesh) for b in Reader(session).audio_batches(BATCH)]
            for _ in range(total):
                for batch in batches:
                    trainable, opt_state, metrics = step(
                        trainable, opt_state, frozen, state["aux"], mask, batch,
                        jax.random.key(7), jnp.asarray([count, total * len(batches)], jnp.int32))
                    count += 1
            state = state | {"trainable": copied(trainable)}
            seen[session, stage.name] = state | {"metrics": jax.device_get(metrics)}
            state = method.end_stage(state, session, number, data(hook=3 + 2 * number))
        state = method.end_task(state, session, data(hook=1))
        # The head's arrays may be overwritten by the next session.
        seen[session, "end"] = state | {
            "statistics": {k: np.array(v) for k, v in state["statistics"].items()}}
    return seen, step, frozen
