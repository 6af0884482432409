"""Prompts and adapters on class streams: S-Prompt++, HiDe-Prompt, LAE, and L2P's and CODA's forms.

The tower is an EAT of three layers; sessions have two of six classes each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from tail_jax import methods
from tail_jax.methods.base import Stage
from tail_jax.methods.hide import contrast
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.models.htsat import HTSATConfig
from tail_jax.models.transformer import BlockConfig, Stack
from tail_jax.training.checkpoints import flatten, tree_hash
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer
from tail_jax.tuning.pseudo_features import fit

pytestmark = pytest.mark.usefixtures("quick_compilation")

TASKS, CLASSES, ROWS, REAL, CLIPS = 3, 6, 7, 5, 9
MODEL = DualEncoder(EATConfig(frames=12, mels=8, patch=4, width=8, layers=3, heads=2, hidden=12),
                    None, classes=CLASSES)
SETTINGS = {"sprompt_pp": {"expert_length": 2, "pull_weight": 0.7},
            "hide": {"expert_length": 2, "centroids": 2, "alignment_batch": 10,
                     "alignment_epochs": 3, "ensemble": 0.25},
            "lae": {"rank": 2, "decay": 0.8, "alpha": 3.0},
            "l2p": {"entries": 7, "length": 2, "chosen": 3}}


@functools.cache
def build(name):
    return methods.build({"name": name} | SETTINGS[name], TASKS, CLASSES)


@functools.cache
def params():
    values = jax.device_get(jax.jit(MODEL.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)  # wide apart, so that rows differ
    return jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.3, x.shape), np.float32)
                        if x.ndim > 1 else x, values)


def classes_of(task):
    return [2 * task, 2 * task + 1]


def make_batch(task, seed=1, rows=ROWS):
    rng = np.random.default_rng(seed)
    return {"audio": rng.normal(0, 5, (rows, 12, 8)).astype(np.float32),
            "label": rng.choice(classes_of(task), rows).astype(np.int32),
            "clip_id": np.arange(rows, dtype=np.int32), "mask": np.arange(rows) < REAL}


class Data:
    """As much of a TaskData as these methods read: random clips of the classes of a session."""

    seed, model = 5, MODEL

    def __init__(self, task):
        self.key = jax.random.key(30 + task)
        self.batch = make_batch(task, 40 + task, CLIPS)
        self.labels = np.repeat(np.array(classes_of(task), np.int32), (CLIPS // 2, CLIPS - 4))

    def map_audio(self, function, state):
        return mapped(function)(state["trainable"], params(), state["aux"], self.batch)


@functools.cache
def mapped(function):
    run = jax.jit(functools.partial(function, MODEL))
    return lambda *args: np.asarray(run(*args))


def with_classes(state, task):
    current, seen = (np.isin(np.arange(CLASSES), c)
                     for c in (classes_of(task), np.arange(2 * task + 2)))
    return state | {"aux": state["aux"] | {"classes": {"current": current, "seen": seen}}}


def begin(method, state, task):
    return method.begin_task(with_classes(state, task), task, Data(task))


@functools.cache
def compiled_gradient(name):
    method = build(name)

    @jax.jit
    def run(trainable, aux, batch):
        def loss(trainable):
            outputs = method.forward(MODEL, trainable, params(), aux, batch, None)
            value, metrics = method.objective(MODEL, trainable, params(), aux, outputs, batch)
            return value, (metrics, outputs)
        return jax.value_and_grad(loss, has_aux=True)(trainable)

    return run


@functools.cache
def compiled_update(name):
    method = build(name)
    optimizer = make_optimizer(OptimizerConfig(), method, trained(name, 1)["trainable"])

    @jax.jit
    def run(trainable, opt_state, gradient, mask, aux, step):
        updated, opt_state, _ = optimizer.update(gradient, opt_state, trainable, mask, step, 3)
        return method.constrain(trainable, updated, aux), opt_state

    return optimizer.init, run


def train(name, state, task):
    """The state after every one of three updates by the project's optimizer."""
    (start, update), trainable = compiled_update(name), state["trainable"]
    opt_state, mask, states = start(trainable), build(name).update_mask(state), []
    for step in range(3):
        _, gradient = compiled_gradient(name)(trainable, state["aux"], make_batch(task, step))
        trainable, opt_state = update(trainable, opt_state, gradient, mask, state["aux"], step)
        states.append(state | {"trainable": trainable})
    return states


def scores(name, state, batch):
    return mapped(build(name).scores)(state["trainable"], params(), state["aux"], batch)


@functools.cache
def encoder():
    return jax.jit(functools.partial(MODEL.encode, "audio"))


def leaves(tree):
    return {k: np.asarray(v) for k, v in flatten(jax.device_get(tree)).items()}


def scattered(tree, seed, width=0.5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(x + rng.normal(0, width, x.shape)), tree)


@functools.cache
def trained(name, tasks):
    """The state at the start of the last of `tasks` sessions, those before trained and ended."""
    method = build(name)
    state = method.init(jax.random.key(2), MODEL, params())
    for task in range(tasks):
        if task:
            state = method.end_task(train(name, state, task - 1)[-1], task - 1, Data(task - 1))
        state = begin(method, state, task)
    return state


def prefixed(state, task, batch):
    """Outputs of the tower with the prefixes of a session, and the head, all rows alike."""
    pool = state["trainable"]["pool"]["audio"]["expert"]
    own = {name: np.zeros((3, 2, 8), np.float32) for name in ("key", "value")}
    for name in own:
        own[name][:2] = pool[name]["0"][task]  # layers 0 and 1: ceil(5 * 3 / 12)
    tuning = {"prefix": own, "prefix_mask": jnp.arange(3)[:, None] < jnp.array([[2, 2]])}
    return encoder()(params() | {"heads": state["trainable"]["heads"]}, {"audio": tuning}, batch)


# --- S-Prompt++ and HiDe-Prompt: prefixes of sessions -------------------------------------------


@pytest.mark.parametrize("name", ["sprompt_pp", "hide"])
def test_prefixes_and_keys_of_other_sessions_keep_their_bits(name):
    state = trained(name, 2)
    before, after = (leaves(s["trainable"]["pool"]) for s in (state, train(name, state, 1)[-1]))
    assert len(before) == {"sprompt_pp": 3, "hide": 2}[name]
    for leaf, old in before.items():
        np.testing.assert_array_equal(after[leaf][[0, 2]], old[[0, 2]], err_msg=leaf)
        assert (after[leaf][1] != old[1]).any(), leaf


@pytest.mark.parametrize("layers, last", [(12, 5), (24, 10), (3, 2), (1, 1)])
def test_session_prefixes_stand_in_five_of_twelve_layers(layers, last):
    assert build("sprompt_pp").layers(TextConfig(layers=layers)) == (0, last)


def test_sprompt_pp_draws_its_key_and_compares_the_classes_of_its_session():
    state, batch = trained("sprompt_pp", 2), make_batch(1)
    (loss, (metrics, outputs)), gradient = compiled_gradient("sprompt_pp")(
        state["trainable"], state["aux"], batch)
    own = prefixed(state, 1, batch)
    np.testing.assert_allclose(outputs["logits"], own["logits"], atol=1e-5)
    q = np.asarray(encoder()(params(), None, batch)["pooled"], np.float64)[:REAL]
    key = np.asarray(state["trainable"]["pool"]["audio"]["keys"][1], np.float64)
    pull = (q @ key / np.linalg.norm(q, axis=1) / np.linalg.norm(key)).mean()
    logits = np.asarray(own["logits"], np.float64)[:REAL, 2:4]
    ce = -log_softmax(logits, 1)[np.arange(REAL), batch["label"][:REAL] - 2].mean()
    assert float(metrics["audio_pull"]) == pytest.approx(pull, abs=1e-5)
    assert float(loss) == pytest.approx(ce - 0.7 * pull, abs=1e-4)
    keys = np.abs(gradient["pool"]["audio"]["keys"]).max(1)
    assert keys[1] > 0 and keys[0] == keys[2] == 0


def test_sprompt_pp_classifies_with_the_prefixes_of_the_nearest_key_seen():
    state, batch = trained("sprompt_pp", 2), make_batch(1, 9)
    pool = scattered(state["trainable"]["pool"], 3)
    q = np.asarray(encoder()(params(), None, batch)["pooled"])
    keys = pool["audio"]["keys"] = 3 * q[:3]  # the last of a session not begun
    state = state | {"trainable": state["trainable"] | {"pool": pool}}
    nearest = (q @ (keys / np.linalg.norm(keys, axis=1, keepdims=True))[:2].T).argmax(1)
    assert set(nearest) == {0, 1}
    got = scores("sprompt_pp", state, batch)
    for task in (0, 1):
        expected = prefixed(state, task, batch)["logits"]
        np.testing.assert_allclose(got[nearest == task], expected[nearest == task], atol=1e-5)


# --- HiDe-Prompt --------------------------------------------------------------------------------


def test_hide_starts_from_the_session_before_and_ends_near_the_mean_of_all():
    method, state = build("hide"), trained("hide", 2)
    fresh = leaves(method.init(jax.random.key(2), MODEL, params())["trainable"]["pool"])
    for leaf, x in leaves(state["trainable"]["pool"]).items():
        np.testing.assert_array_equal(x[1], x[0])
        np.testing.assert_array_equal(x[2], fresh[leaf][2])
        assert (x[0] != fresh[leaf][0]).any()
    for task in (1, 2):  # 3/4 of the own, 1/4 of the mean of those before
        learned = train("hide", state, task)[-1]
        state = method.end_task(learned, task, Data(task))
        before, after = (leaves(s["trainable"]["pool"]) for s in (learned, state))
        for leaf, x in before.items():
            expected = 0.75 * x[task] + 0.25 * (x[0] if task == 1 else (x[0] + x[1]) / 2)
            np.testing.assert_allclose(after[leaf][task], expected, atol=1e-6)
            np.testing.assert_array_equal(after[leaf][:task], x[:task])
        if task == 1:
            state = begin(method, state, 2)


def test_hide_keeps_statistics_of_both_kinds_of_features():
    state = build("hide").end_task(train("hide", trained("hide", 2), 1)[-1], 1, Data(1))
    data, statistics = Data(1), state["statistics"]
    features = {"prompted": prefixed(state, 1, data.batch)["pooled"],
                "unprompted": encoder()(params(), None, data.batch)["pooled"]}
    assert statistics["session"].tolist() == [0, 0, 1, 1, -1, -1]
    for name, x in features.items():
        own = statistics[name]
        np.testing.assert_allclose(own["share"].sum(1), [1, 1, 1, 1, 0, 0], atol=1e-6)
        for c in (2, 3):
            mine = np.asarray(x, np.float64)[data.labels == c]
            mean = np.einsum("k,kd->d", own["share"][c], own["mean"][c])
            square = np.einsum("k,kd->d", own["share"][c], own["variance"][c] + own["mean"][c]**2)
            np.testing.assert_allclose(mean, mine.mean(0), atol=1e-4)
            np.testing.assert_allclose(square - mean**2, mine.var(0), atol=1e-3)
    following = begin(build("hide"), state, 2)
    np.testing.assert_allclose(
        following["aux"]["means"][2], features["prompted"][data.labels == 2].mean(0), atol=1e-4)


def test_hide_classifies_with_the_prefixes_of_the_session_that_the_router_says():
    state, batch = trained("hide", 2), make_batch(1, 9)
    router, pool = (scattered(tree, 3) for tree in (state["aux"]["router"],
                                                    state["trainable"]["pool"]))
    q = np.asarray(encoder()(params(), None, batch)["pooled"])
    hidden = np.maximum(q @ router["hidden"]["kernel"] + router["hidden"]["bias"], 0)
    # The session of row 0 or of row 1, whichever is more alike; the last has not begun.
    way = hidden[0] - hidden[1]
    router["output"] = {"kernel": np.stack([way, 0 * way, way], 1), "bias": np.float32(
        [-way @ (hidden[0] + hidden[1]) / 2, 0, 1e6])}
    state = state | {"trainable": state["trainable"] | {"pool": pool},
                     "aux": state["aux"] | {"router": router}}
    says = (hidden @ router["output"]["kernel"] + router["output"]["bias"])[:, :2].argmax(1)
    assert set(says) == {0, 1}
    got = scores("hide", state, batch)
    for task in (0, 1):
        expected = prefixed(state, task, batch)["logits"]
        np.testing.assert_allclose(got[says == task], expected[says == task], atol=1e-5)


def test_contrast_is_the_cross_entropy_of_inner_products_with_the_identity():
    rng = np.random.default_rng(7)
    means, features = rng.normal(size=(CLASSES, 4)), rng.normal(size=(ROWS, 4))
    old, mask = np.isin(np.arange(CLASSES), [0, 4]), np.arange(ROWS) < REAL
    m = np.concatenate([means[old], features[mask]])
    expected = -np.diag(log_softmax(m @ m.T / 0.8, axis=1)).mean()
    got = contrast(jnp.float32(means), old, jnp.float32(features), mask, 0.8)
    assert float(got) == pytest.approx(expected, rel=1e-5)
    none = contrast(jnp.float32(means), old & False, jnp.float32(features), mask, 0.8)
    x = features[mask]
    assert float(none) == pytest.approx(-np.diag(log_softmax(x @ x.T / 0.8, axis=1)).mean(),
                                        rel=1e-5)


def test_hide_trains_head_and_router_in_one_program_each_for_all_sessions():
    method, before = build("hide"), fit._cache_size()
    state = begin(method, method.init(jax.random.key(4), MODEL, params()), 0)
    hashes = []
    for task in range(TASKS):
        state = method.end_task(state, task, Data(task))
        hashes.append([tree_hash(tree) for tree in (state["trainable"]["heads"],
                                                    state["aux"]["router"])])
        again = method.end_task(begin(method, state, task), task, Data(task))
        assert tree_hash(again["aux"]["router"]) == hashes[-1][1]  # nothing but the key is random
        if task + 1 < TASKS:
            state = begin(method, state, task + 1)
    assert len({h for pair in hashes for h in pair}) == 6
    assert fit._cache_size() - before <= 2


# --- LAE ----------------------------------------------------------------------------------------


def test_lae_offline_follows_the_online_adapter_by_its_moving_average():
    method = build("lae")
    state = begin(method, method.init(jax.random.key(2), MODEL, params()), 0)
    state = train("lae", method.begin_stage(state, 0, 0, None), 0)[-1]
    lora = state["trainable"]["lora"]
    for online, offline in zip(*map(jax.tree.leaves, (lora["online"], lora["offline"]))):
        np.testing.assert_array_equal(online, offline)  # in the first session it is the same
    state = method.begin_stage(begin(method, state, 1), 1, 1, None)
    expected = leaves(lora["offline"])
    for after in train("lae", state, 1):
        online = leaves(after["trainable"]["lora"]["online"])
        expected = {k: 0.8 * x + 0.2 * online[k].astype(np.float64) for k, x in expected.items()}
        for leaf, x in leaves(after["trainable"]["lora"]["offline"]).items():
            np.testing.assert_allclose(x, expected[leaf], rtol=1e-5, atol=1e-7)
            assert (x != online[leaf]).any()


def test_a_published_decay_is_exact_in_single_precision():
    method = methods.build({"name": "lae"}, TASKS, CLASSES)
    state = begin(method, method.init(jax.random.key(2), MODEL, params()), 1)
    values = lambda x: {"online": {"a": jnp.float32(x)}, "offline": {"a": jnp.float32(0)}}
    after = jax.jit(method.constrain)({"lora": values(3)}, {"lora": values(5)}, state["aux"])
    assert float(after["lora"]["offline"]["a"]) == pytest.approx(5e-4, rel=1e-6)
    assert float(after["lora"]["online"]["a"]) == 5


def test_lae_holds_its_adapter_in_the_first_stage_of_later_sessions():
    method = build("lae")
    assert method.stages(0, (4,)) == (Stage("", "5 epochs"),)
    assert method.stages(1, (4, 5)) == (Stage("head", "3 epochs"), Stage("adapter", "2 epochs"))
    state = begin(method, method.init(jax.random.key(2), MODEL, params()), 1)
    moved = []
    for stage in (0, 1):
        state = method.begin_stage(state, 1, stage, None)
        before, after = (leaves(s["trainable"]) for s in (state, train("lae", state, 1)[-1]))
        moved.append({leaf.split("/")[1] for leaf, x in before.items() if (after[leaf] != x).any()})
    assert moved == [{"classes"}, {"classes", "online", "offline"}]


def test_lae_scores_are_the_larger_of_two_softmaxes_among_the_classes_seen():
    method, batch = build("lae"), make_batch(1, 9)
    state = begin(method, method.init(jax.random.key(2), MODEL, params()), 1)
    trainable = state["trainable"] | {"lora": scattered(state["trainable"]["lora"], 3)}
    both = []
    for name in ("online", "offline"):
        lora = {layer: {"a": p["a"], "b": 1.5 * p["b"]}  # alpha / rank
                for layer, p in trainable["lora"][name]["audio"].items()}
        out = encoder()(params() | {"heads": trainable["heads"]}, {"audio": {"lora": lora}}, batch)
        both.append(softmax(np.asarray(out["logits"], np.float64)[:, :4], axis=1))
    assert (both[0] > both[1]).any() and (both[0] < both[1]).any()
    got = scores("lae", state | {"trainable": trainable}, batch)
    np.testing.assert_allclose(got[:, :4], np.maximum(*both), atol=1e-5)
    assert not got[:, 4:].any()
    # The run tells the classes of a session at training alone; what is stored has to be enough.
    stored = method.stored(state | {"trainable": trainable})
    aux = {"classes": with_classes(state, 0)["aux"]["classes"]} | method.restored(stored)["aux"]
    np.testing.assert_array_equal(got, scores("lae", {"trainable": trainable, "aux": state["aux"]
                                                      | aux}, batch))


# --- L2P, CODA-Prompt and DualPrompt on class streams -------------------------------------------


def test_l2p_reads_the_mean_output_of_the_prompts_that_a_row_chose_alone():
    method, batch = build("l2p"), make_batch(0, 9)
    assert method.pool_from == "prompts"
    state = begin(method, method.init(jax.random.key(2), MODEL, params()), 0)
    trainable = scattered(state["trainable"], 3)
    bare = encoder()(params(), None, batch)
    q, keys = np.asarray(bare["pooled"]), trainable["pool"]["audio"]["keys"]
    best = np.argsort(-q @ (keys / np.linalg.norm(keys, axis=1, keepdims=True)).T)[:, :3]
    assert len({*map(tuple, np.sort(best))}) > 1
    # The blocks on prompts that are tokens like any other, before those of the clip.
    chosen = trainable["pool"]["audio"]["prompts"]["0"][best, 0].reshape(ROWS, 6, 8)
    block = BlockConfig(8, 2, 12, "post", 1e-6)
    hidden, *_ = jax.jit(Stack(block, 3).apply)({"params": params()["audio"]["encoder"]},
                                                jnp.concatenate([chosen, bare["hidden"][0]], 1))
    head = trainable["heads"]["classes"]
    expected = np.asarray(hidden[-1])[:, :6].mean(1) @ head["kernel"] + head["bias"]
    state = state | {"trainable": trainable}
    got = scores("l2p", state, batch)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    order = np.array([3, 0, 5, 6, 2, 1, 4])
    moved = scores("l2p", state, {k: v[order] for k, v in batch.items()})
    np.testing.assert_allclose(moved, got[order], atol=1e-5)
    alone = scores("l2p", state, batch | {"audio": np.where(
        np.arange(ROWS)[:, None, None] == 2, batch["audio"], 0)})
    np.testing.assert_allclose(alone[2], got[2], atol=1e-5)


def test_l2p_subtracts_a_tenth_of_the_cosines_of_the_chosen_keys():
    state, batch = trained("l2p", 1), make_batch(0)
    (loss, (_, outputs)), _ = compiled_gradient("l2p")(state["trainable"], state["aux"], batch)
    q = np.asarray(encoder()(params(), None, batch)["pooled"], np.float64)[:REAL]
    keys = np.asarray(state["trainable"]["pool"]["audio"]["keys"], np.float64)
    cosines = (q / np.linalg.norm(q, axis=1, keepdims=True)
               @ (keys / np.linalg.norm(keys, axis=1, keepdims=True)).T)
    pull = np.sort(cosines)[:, -3:].sum(1).mean()
    logits = np.asarray(outputs["logits"], np.float64)[:REAL, :2]
    ce = -log_softmax(logits, 1)[np.arange(REAL), batch["label"][:REAL]].mean()
    assert float(loss) == pytest.approx(ce - 0.1 * pull, abs=1e-5) and abs(pull) > 0.1


def test_l2p_cannot_pool_prompts_where_they_do_not_flow():
    tower = HTSATConfig(spec_size=16, mels=8, patch=2, width=6, depths=(1, 2), heads=(2, 2),
                        window=4)
    with pytest.raises(ValueError, match="pool_from is 'prompts'.*HTSAT.*pool_from=tower"):
        build("l2p").init_tuning(jax.random.key(0), DualEncoder(tower, None, classes=3))
    with pytest.raises(ValueError, match="method.pool_from is 'cls'"):
        methods.build({"name": "l2p", "pool_from": "cls"})


def test_defaults_on_class_streams_are_the_published_ones():
    l2p = methods.build({"name": "l2p"}, 10, 50)
    assert (l2p.entries, l2p.length, l2p.chosen, l2p.pull_weight) == (10, 5, 5, 0.1)
    coda = methods.build({"name": "coda"}, 10, 50)
    assert (coda.own, coda.length, coda.learning_rate, coda.epochs) == (10, 8, 1e-3, 20)
    assert methods.build({"name": "coda"}, 7, 35).own * 7 == 98
    assert methods.build({"name": "coda"}, 210, 630).own == 1
    dual = methods.build({"name": "dualprompt"}, 10, 50)
    assert (dual.general_length, dual.expert_length) == (5, 5)
    assert dual.layers(TextConfig(layers=12)) == (2, 5)
    for name in ("sprompt_pp", "hide"):
        own = methods.build({"name": name}, 10, 50)
        assert (own.expert_length, own.learning_rate, own.epochs) == (20, 0.005, 50)


def test_defaults_of_class_streams_leave_audio_text_streams_and_settings_alone():
    assert methods.defaults("l2p")["length"] == methods.build({"name": "l2p"}, 3, 0).length == 10
    assert methods.defaults("l2p", classes=True)["length"] == 5
    assert methods.build({"name": "l2p", "length": 3}, 10, 50).length == 3
    for name, method in methods.METHODS.items():
        assert set(method.class_defaults) <= set(methods.defaults(name)), name
