"""The registry, the hooks of the methods, and PTAT's loss and teacher."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax import losses, methods
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import BUFFERS, DualEncoder
from tail_jax.training.kept import Kept
from tail_jax.tuning.masks import apply_rules, count, leaf_name

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = DualEncoder(
    ASTConfig(frames=12, mels=8, patch=4, stride=4, width=8, layers=2, heads=2, hidden=12,
              epsilon=1e-5, dropout=0.3),
    TextConfig(vocab_size=20, width=8, layers=2, heads=2, hidden=12, max_positions=16,
               pool="cls", position_offset=0, dropout=0.3), embedding=6)
ROWS, REAL = 5, 4


@functools.cache
def params():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0)))


@functools.cache
def batch():
    rng = np.random.default_rng(1)
    return {"audio": rng.normal(size=(ROWS, 12, 8)).astype(np.float32),
            "token_ids": rng.integers(0, 20, (ROWS, 7)).astype(np.int32),
            "token_mask": np.arange(7) < np.array([7, 3, 5, 2, 4])[:, None],
            "clip_id": np.array([0, 1, 1, 2, 0], np.int32),
            "caption_id": np.arange(ROWS, dtype=np.int32),
            "caption_key": np.array([0, 1, 2, 0, 0], np.int32), "mask": np.arange(ROWS) < REAL}


def build(name, **settings):
    return methods.build({"name": name, "prompts": {"length": 2}} | settings
                         if name in ("prompts", "ptat") else {"name": name} | settings)


def moved(tree, seed):
    """The tree some way off: what training might have made of it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + rng.normal(0, 0.2, x.shape), jnp.float32), tree)


def second_task(method):
    """(trainable, aux) in the middle of the second task: student and teacher differ."""
    state = method.init(jax.random.key(2), MODEL, params())
    state = method.begin_task(state | {"trainable": moved(state["trainable"], 3)}, 1, None)
    return moved(state["trainable"], 4), state["aux"]


def embeddings(seed):
    rng = np.random.default_rng(seed)
    out = rng.normal(size=(4, ROWS, 6)).astype(np.float32)
    out /= np.linalg.norm(out, axis=-1, keepdims=True)
    return dict(zip(("audio", "text", "teacher_audio", "teacher_text"), jnp.asarray(out)))


def objective(method, trainable, aux, outputs):
    loss, metrics = method.objective(MODEL, trainable, method.frozen(params()), aux, outputs,
                                     batch())
    return float(loss), {k: float(v) for k, v in metrics.items()}


# --- Registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config, message", [
    ({}, "no method None; expected one of"), ({"name": "ptatt"}, "no method 'ptatt'"),
    ({"name": "sequential", "prompts": {}}, r"method has no settings \['prompts'\]"),
    ({"name": "ptat", "lambda": 1}, r"method has no settings \['lambda'\]"),
    ({"name": "ptat", "prompts": {"len": 1}}, r"method.prompts has no settings \['len'\]"),
    ({"name": "prompts", "prompts": {"length": 0}}, "prompts.length is 0"),
    ({"name": "ptat", "similarity_form": "kl"}, "method.similarity_form is 'kl'"),
    ({"name": "ptat", "feature_form": "l1"}, "method.feature_form is 'l1'"),
    ({"name": "ptat", "feature_temperature": 0}, "method.feature_temperature is 0"),
    ({"name": "ewc", "penalty_weight": -1.0}, "method.penalty_weight is -1.0; expected 0 or more"),
    ({"name": "l2p", "learning_rate": float("nan")}, "method.learning_rate is nan"),
    ({"name": "ptat", "prompts": {"first_layer": -1}}, "method.prompts.first_layer is -1")])
def test_wrong_settings_are_errors_that_name_them(config, message):
    with pytest.raises(ValueError, match=message):
        methods.build(config)


@pytest.mark.parametrize("name", methods.METHODS)
def test_defaults_build_the_method_and_settings_change_it(name):
    method = methods.build(methods.defaults(name))
    assert method == methods.METHODS[name]()
    assert methods.build({"name": name, "learning_rate": 0.5}).learning_rate == 0.5
    config = methods.defaults(name)
    methods.build(config)
    assert config == methods.defaults(name)  # the caller's dict is left alone


# --- Trees ------------------------------------------------------------------------------------


# Those for models without text have tests of their own.
@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items()
                                  if method.retrieves])
def test_rules_cover_every_leaf_once_and_decay_matrices_only(name):
    method = build(name, weight_decay=0.3)
    trainable = method.init(jax.random.key(0), MODEL, params())["trainable"]
    rates = apply_rules(trainable, method.learning_rates())
    assert all(rate > 0 for rate in jax.tree.leaves(rates))
    decays = apply_rules(trainable, method.weight_decays())
    for path, decay in jax.tree_util.tree_leaves_with_path(decays):
        matrix = leaf_name(path).rsplit("/", 1)[-1] in ("kernel", "embedding", "w")
        assert decay == (0.3 if matrix else 0.0), leaf_name(path)


def test_prompts_give_each_group_its_rate():
    method = build("ptat", learning_rate=1.0, heads_learning_rate=2.0, scale_learning_rate=3.0)
    trainable = method.init(jax.random.key(0), MODEL, params())["trainable"]
    rates = apply_rules(trainable, method.learning_rates())
    groups = {k: set(jax.tree.leaves(v)) for k, v in rates.items()}
    assert groups == {"prompts": {1.0}, "heads": {2.0}, "logit_scale": {3.0}}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_resolve_takes_own_heads_and_never_puts_prompts_into_the_parameters(heads, scale):
    method = build("prompts", train_heads=heads, train_scale=scale)
    trainable = moved(method.init(jax.random.key(0), MODEL, params())["trainable"], 5)
    frozen = method.frozen(params())
    before = jax.tree.map(np.copy, frozen)
    resolved, tuning = method.resolve(MODEL, trainable, frozen)
    assert jax.tree.structure(resolved) == jax.tree.structure(params())
    assert resolved["audio"] is frozen["audio"] and resolved["text"] is frozen["text"]
    assert resolved["heads"] is (trainable["heads"] if heads else frozen["heads"])
    assert resolved["logit_scale"] is (trainable if scale else frozen)["logit_scale"]
    assert set(tuning) == {"audio", "text"}
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen, before))
    assert {k for k in trainable} == ({"prompts"} | ({"heads"} if heads else set())
                                      | ({"logit_scale"} if scale else set()))


@pytest.mark.parametrize("name", ["sequential", "joint"])
def test_full_training_updates_everything_but_statistics(name):
    method = build(name)
    state = method.init(jax.random.key(0), MODEL, params())
    mask = method.update_mask(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state["trainable"])
    frozen = [leaf_name(p) for p, on in jax.tree_util.tree_leaves_with_path(mask) if not on]
    assert frozen == ["audio/input_mean", "audio/input_std"]
    assert {n.rsplit("/", 1)[-1] for n in frozen} <= set(BUFFERS)
    assert count(state["trainable"]) == count(params()) and not method.frozen(params())


def test_the_frozen_method_learns_nothing_and_changes_nothing():
    method = build("frozen")
    assert method.init(jax.random.key(0), MODEL, params())["trainable"] == {}
    assert method.resolve(MODEL, {}, params()) == (params(), None) and not method.trains


# --- PTAT: the loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["matrix_kl", "cross_time"])
def test_ptat_without_weights_has_the_loss_of_prompts(form):
    ptat = build("ptat", similarity_weight=0.0, feature_weight=0.0, similarity_form=form)
    trainable, aux = second_task(ptat)
    outputs = embeddings(6)
    assert float(aux["distil"]) == 1
    got, metrics = objective(ptat, trainable, aux, outputs)
    expected, _ = objective(build("prompts"), trainable, {}, outputs)
    assert got == pytest.approx(expected, abs=1e-6)
    assert metrics["similarity"] > 0.01 and metrics["feature"] > 0.01


def test_ptat_adds_its_terms_by_their_weights_from_the_second_task_on():
    method = build("ptat", similarity_weight=0.5, feature_weight=3.0)
    trainable, aux = second_task(method)
    loss, m = objective(method, trainable, aux, embeddings(7))
    assert loss == pytest.approx(m["retrieval"] + 0.5 * m["similarity"] + 3 * m["feature"],
                                 abs=1e-5)
    first = method.begin_task({"trainable": trainable, "aux": aux}, 0, None)["aux"]
    loss, m = objective(method, trainable, first, embeddings(7))
    assert loss == pytest.approx(m["retrieval"], abs=1e-6) and m["feature"] > 0.01


def test_each_side_of_the_similarity_term_has_its_own_scale():
    method = build("ptat")
    trainable, aux = second_task(method)
    trainable["logit_scale"] = jnp.log(12.0)
    aux["teacher"]["logit_scale"] = jnp.log(5.0)
    o, mask = embeddings(8), jnp.asarray(batch()["mask"])
    expected = losses.similarity_distillation(
        (o["audio"], o["text"], jnp.log(12.0)),
        (o["teacher_audio"], o["teacher_text"], jnp.log(5.0)), mask, 2.0)
    assert objective(method, trainable, aux, o)[1]["similarity"] == pytest.approx(
        float(expected), abs=1e-5)


def test_cross_time_by_hand():
    # One positive a row; teacher = student = identity, scale 3: both pairings are log(1 + 2 e^-3).
    method = build("ptat", similarity_form="cross_time")
    trainable, aux = second_task(method)
    trainable["logit_scale"] = jnp.log(3.0)
    eye = jnp.eye(3)
    ids = np.arange(3)
    rows = {"clip_id": ids, "caption_key": ids, "mask": np.ones(3, bool)}

    def term(**changed):
        outputs = dict.fromkeys(("audio", "text", "teacher_audio", "teacher_text"), eye) | changed
        return float(method.objective(MODEL, trainable, method.frozen(params()), aux, outputs,
                                      rows)[1]["similarity"])

    right, wrong = np.log(1 + 2 * np.exp(-3)), np.log(np.exp(3) + 2)
    assert term() == pytest.approx(right, abs=1e-6)
    # A teacher's text that fits nothing spoils the pairing with the new audio alone: half of it.
    turned = jnp.roll(eye, 1, axis=0)
    for name in ("teacher_text", "teacher_audio", "text", "audio"):
        assert term(**{name: turned}) == pytest.approx((right + wrong) / 2, abs=1e-6)
    # New with new and old with old do not meet.
    assert term(text=turned, teacher_audio=turned) == pytest.approx(right, abs=1e-6)
    assert term(audio=turned, text=turned) == pytest.approx(wrong, abs=1e-6)


# --- PTAT: the teacher ------------------------------------------------------------------------


def test_teacher_is_a_copy_taken_at_the_start_of_the_task():
    method = build("ptat")
    state = method.init(jax.random.key(0), MODEL, params())
    state["trainable"] = moved(state["trainable"], 9)
    values = jax.device_get(state["trainable"])
    begun = method.begin_task(state, 1, None)
    assert jax.tree.structure(begun) == jax.tree.structure(state)
    assert (float(begun["aux"]["distil"]), float(method.begin_task(state, 0, None)["aux"]["distil"])) \
        == (1, 0)
    jax.tree.map(lambda x: x.delete(), begun["trainable"])  # as donation does
    jax.tree.map(np.testing.assert_array_equal, begun["aux"]["teacher"], values)


def test_kept_teacher_outputs_give_the_loss_and_gradient_of_the_live_teacher():
    method = build("ptat")
    trainable, aux = second_task(method)
    frozen = method.frozen(params())
    # Whole sets are kept, in another order than the batch.
    b = batch() | {"clip_id": np.array([3, 1, 4, 0, 2], np.int32),
                   "caption_id": np.array([4, 2, 0, 1, 3], np.int32)}
    order, texts = np.argsort(b["clip_id"]), np.argsort(b["caption_id"])
    own = MODEL, trainable, frozen, aux
    audio = method.feature("teacher_audio", *own, {"audio": b["audio"][order]})
    text = method.feature("teacher_text", *own, {
        "token_ids": b["token_ids"][texts], "token_mask": b["token_mask"][texts]})
    kept = b | Kept({"teacher_audio": ("audio", np.asarray(audio)),
                     "teacher_text": ("text", np.asarray(text))}).rows(b)

    @jax.jit
    def run(trainable, batch):
        def loss(trainable):
            outputs = method.forward(MODEL, trainable, frozen, aux, batch, jax.random.key(1))
            return method.objective(MODEL, trainable, frozen, aux, outputs, batch)
        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (live, metrics), gradient = run(trainable, b)
    (again, _), same = run(trainable, kept)
    assert float(live) == pytest.approx(float(again), abs=1e-6)
    assert float(metrics["similarity"]) > 1e-3 and float(metrics["feature"]) > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), gradient, same)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient["prompts"]))


def test_no_gradient_reaches_the_teacher():
    method = build("ptat")
    trainable, aux = second_task(method)
    frozen = method.frozen(params())

    def loss(teacher):
        own = aux | {"teacher": teacher}
        outputs = method.forward(MODEL, trainable, frozen, own, batch(), None)
        return sum(outputs[k].sum() for k in ("teacher_audio", "teacher_text"))

    gradient = jax.jit(jax.grad(loss))(aux["teacher"])
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


# --- Dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, settings, random", [
    ("prompts", {}, False), ("sequential", {}, False), ("sequential", {"dropout": True}, True)])
def test_dropout_acts_in_full_training_that_asks_for_it_alone(name, settings, random):
    method = build(name, **settings)
    state = method.init(jax.random.key(0), MODEL, params())
    run = jax.jit(lambda key: method.forward(
        MODEL, state["trainable"], method.frozen(params()), state["aux"], batch(), key))
    with_key, without = run(jax.random.key(1, impl="rbg")), run(None)
    for side in ("audio", "text"):
        assert (np.abs(with_key[side] - without[side]).max() > 1e-3) == random


def test_a_method_is_a_frozen_description():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build("ptat").learning_rate = 1.0
