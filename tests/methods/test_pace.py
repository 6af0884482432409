"""PACE in miniature: four sessions of six classes, of which two tune a tower of three blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tail_jax import losses, methods
from tail_jax.methods import boundary
from tail_jax.methods.pace import ADAPT, HEAD, PACE, PROBE
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.models.htsat import HTSATConfig
from tail_jax.tuning import depth
from tail_jax.tuning.masks import apply_rules
from tests.methods.tiny_pace import (
    AST, BATCH, CLASSES, LAYERS, MODEL, SESSIONS, SETTINGS, SIZES, TOWER, WIDTH, Reader, data_of,
    params, run, with_classes)

pytestmark = pytest.mark.usefixtures("quick_compilation")

METHOD = PACE(**SETTINGS)


@pytest.fixture(scope="module")
def states(quick_compilation):
    return run(METHOD, 4)


def dense(delta, lora=None, scale=1.0):
    """The backbone's parameters with explicit kernels."""
    tree = jax.tree.map(np.array, params()["audio"])
    for i in range(LAYERS):
        for j, name in enumerate(("key", "value")):
            kernel = tree["encoder"][f"layer_{i:02d}"][name]["kernel"]
            kernel += np.asarray(delta)[i, j]
            if lora is not None:
                kernel += scale * np.asarray(lora[name]["a"][i]) @ np.asarray(lora[name]["b"][i])
    return params() | {"audio": tree}


@jax.jit
def reference(tree, audio):
    """hidden [L + 1, n, S, d], pooled [n, d] of a plain forward pass."""
    out = MODEL.encode_audio(tree, None, audio)
    return jnp.stack(out["hidden"]), out["pooled"]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- Sessions and stages ----------------------------------------------------------------------


def names(method, task, sizes):
    return [(stage.name, stage.duration) for stage in method.stages(task, sizes)]


def test_stages_are_those_of_the_paper_until_enough_clips_were_seen():
    method, sizes = PACE(), [16] * 315
    assert names(method, 0, sizes[:1]) == [(PROBE, ""), (HEAD, "1 epochs"), (ADAPT, "")]
    tuned = [t for t in range(315) if names(method, t, sizes[:t + 1])]
    assert tuned == [*range(14)] and tuned[-1] + 1 == depth.last_tuned_session(sizes, 220)
    assert names(method, 13, sizes[:14]) == [(HEAD, "1 epochs"), (ADAPT, "")]
    assert [bool(names(method, t, [158] * (t + 1))) for t in range(4)] == [True] * 2 + [False] * 2


@pytest.mark.parametrize("settings, first, second", [
    ({"first_session": False}, [], []), ({"multi_session": False}, [PROBE, HEAD, ADAPT], []),
    ({"tune_from": 4}, [HEAD, ADAPT], [HEAD, ADAPT]),
    ({"warm_up": "", "freeze_head": False}, [PROBE, ADAPT], [ADAPT]),
    ({"n_stop": 0}, [PROBE, HEAD, ADAPT], [])])
def test_stages_can_be_left_out(settings, first, second):
    method = PACE(**settings)
    assert [name for name, _ in names(method, 0, [9])] == first
    assert [name for name, _ in names(method, 1, [9, 9])] == second


def test_one_program_serves_all_stages_and_sessions(states):
    assert states[1].traces == 1


def test_nothing_changes_after_the_last_session_that_tunes(states):
    seen = states[0]
    assert (2, ADAPT) not in seen and (1, ADAPT) in seen
    for session in (2, 3):
        for part in ("trainable", "aux"):
            drop = lambda tree: {k: v for k, v in tree.items() if k != "classes"}
            jax.tree.map(np.testing.assert_array_equal, drop(seen[1, "end"][part]),
                         drop(seen[session, "end"][part]))


# --- What moves -----------------------------------------------------------------------------------


def test_probe_moves_everything_and_is_thrown_away(states):
    seen = states[0]
    before, probed = seen[0, "start"]["trainable"], seen[0, PROBE]["trainable"]
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), before, probed)
    assert all(jax.tree.leaves(changed["lora"]))
    start = seen[0, HEAD, "begin"]["trainable"]
    assert not any(np.any(pair["b"]) for pair in start["lora"]["audio"].values())
    assert not any(np.any(x) for x in jax.tree.leaves(start["heads"]))


@pytest.mark.parametrize("session", [0, 1])
def test_head_then_blocks_from_the_chosen_one_move_and_the_rest_keeps_its_bits(states, session):
    seen = states[0]
    first = int(seen[session, ADAPT]["aux"]["first_block"])
    assert 1 < first <= LAYERS  # or nothing would be held
    warm, start = seen[session, HEAD], seen[session, HEAD, "begin"]
    jax.tree.map(np.testing.assert_array_equal, warm["trainable"]["lora"],
                 start["trainable"]["lora"])
    own = np.isin(np.arange(CLASSES), SESSIONS[session])
    kernel = np.asarray(warm["trainable"]["heads"]["classes"]["kernel"])
    assert np.any(kernel[:, own], 0).all() and not kernel[:, ~own].any()
    adapted = seen[session, ADAPT]["trainable"]
    jax.tree.map(np.testing.assert_array_equal, adapted["heads"], warm["trainable"]["heads"])
    for pair, old in zip(adapted["lora"]["audio"].values(),
                         start["trainable"]["lora"]["audio"].values()):
        np.testing.assert_array_equal(pair["a"][:first - 1], old["a"][:first - 1])
        assert not np.any(pair["b"][:first - 1])
    delta = np.asarray(seen[session, "end"]["aux"]["delta"])
    assert not delta[:first - 1].any() and delta[first - 1:].any((1, 2, 3)).all()


def test_sessions_add_up_in_delta_and_the_backbone_is_never_touched(states):
    seen, _, frozen = states
    total = np.zeros((LAYERS, 2, WIDTH, WIDTH))
    for session in (0, 1):
        lora = seen[session, ADAPT]["trainable"]["lora"]["audio"]
        total += np.stack([np.asarray(lora[name]["a"], np.float64) @ np.asarray(lora[name]["b"])
                           for name in ("key", "value")], 1)
        np.testing.assert_allclose(seen[session, "end"]["aux"]["delta"], total, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, METHOD.frozen(params()), jax.device_get(frozen))
    assert "heads" not in frozen


def test_encoder_is_one_with_the_kernels_added(states):
    seen, _, frozen = states
    state, audio = seen[1, ADAPT], Reader(1).audio
    hidden, pooled = reference(dense(state["aux"]["delta"], state["trainable"]["lora"]["audio"]),
                               audio)
    out = jax.jit(functools.partial(METHOD.encode, "audio", MODEL))(
        state["trainable"], frozen, state["aux"], {"audio": jnp.asarray(audio)})
    np.testing.assert_allclose(jnp.stack(out["hidden"]), hidden, atol=2e-4)
    np.testing.assert_allclose(out["embedding"], unit(np.asarray(pooled)), atol=1e-4)
    assert np.abs(hidden - reference(params(), audio)[0]).max() > 1e-3


# --- Layer choice and subspaces -------------------------------------------------------------------


def test_blocks_are_chosen_by_how_far_the_probe_moved_their_outputs(states):
    seen = states[0]
    state, audio = seen[0, PROBE], Reader(0).audio
    probed, _ = reference(dense(np.zeros((LAYERS, 2, 1, 1)), state["trainable"]["lora"]["audio"]),
                          audio)
    plain, _ = reference(params(), audio)
    expected = []
    for x, y in zip(np.asarray(probed, np.float64)[1:], np.asarray(plain, np.float64)[1:]):
        x, y = (z.reshape(-1, WIDTH) - z.reshape(-1, WIDTH).mean(0) for z in (x, y))
        k, l = x @ x.T, y @ y.T
        expected.append((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))
    found = seen[0, "end"]["statistics"]["similarity"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    first = int(seen[0, ADAPT]["aux"]["first_block"])
    assert first == depth.first_below(expected, METHOD.layer_threshold)


@pytest.mark.parametrize("settings", [{}, {"reading": "complement", "unlearn_scale": 0.0},
                                      {"scale_projection": True, "energy": 0.8}])
def test_projectors_are_of_the_inputs_of_the_unlearned_model(states, settings):
    seen, _, frozen = states
    method, state = PACE(**SETTINGS | settings), seen[0, "end"]
    scaled, start = method._projectors(state, data_of(1, 0, frozen))
    delta = np.asarray(state["aux"]["delta"])
    hidden, _ = reference(dense(-method.unlearn_scale * delta), Reader(1).audio)
    first = int(state["aux"]["first_block"])
    for block in range(LAYERS):
        rows = np.asarray(hidden[block], np.float64).reshape(-1, WIDTH)
        _, s, vt = np.linalg.svd(rows)  # squared singular values: eigenvalues of the moments
        k = int(np.argmax(np.cumsum(s**2) / (s**2).sum() >= method.energy)) + 1
        p = vt[:k].T @ vt[:k]
        p = np.eye(WIDTH) - p if method.reading == "complement" else p
        p = p if block >= first - 1 else np.eye(WIDTH)
        np.testing.assert_allclose(start[block], p, atol=2e-4)
        held = block < first - 1 or not method.scale_projection
        norm = 1 if held else np.sqrt(k if method.reading == "principal" else WIDTH - k)
        np.testing.assert_allclose(scaled[block], p / norm, atol=2e-4)
    assert 0 < k < WIDTH or settings == {}


def test_first_factor_is_in_the_subspace_of_its_session_and_free_in_the_first(states):
    seen = states[0]
    np.testing.assert_array_equal(seen[0, ADAPT]["aux"]["projectors"],
                                  np.broadcast_to(np.eye(WIDTH), (LAYERS, WIDTH, WIDTH)))
    state = seen[1, ADAPT]
    p = np.asarray(state["aux"]["projectors"], np.float64)
    first = int(state["aux"]["first_block"])
    assert np.linalg.matrix_rank(p[-1], tol=1e-3) < WIDTH
    for name, pair in state["trainable"]["lora"]["audio"].items():
        a = np.asarray(pair["a"], np.float64)[first - 1:]
        assert np.linalg.norm(a - p[first - 1:] @ a) <= 1e-6 * np.linalg.norm(a)
        start = seen[1, "start"]["trainable"]["lora"]["audio"][name]["a"][first - 1:]
        assert np.linalg.norm(a - start) > 1e-4 * np.linalg.norm(a)


# --- Boundary loss ----------------------------------------------------------------------------


def test_boundary_is_of_wrong_copies_under_the_model_the_session_starts_with(states):
    seen, _, frozen = states
    found = seen[0, "start"]["aux"]["boundary"]
    active = lambda session, stage: bool(seen[session, stage]["aux"]["boundary"]["active"])
    assert not np.any(found["present"]) and not active(0, ADAPT)
    assert active(1, ADAPT) and not active(1, HEAD)
    assert seen[1, ADAPT]["metrics"]["boundary"] > 0 == seen[1, HEAD]["metrics"]["boundary"]
    method = PACE(**SETTINGS | {"reg_on_fsa": True})
    state, data = seen[0, "start"], data_of(0, 0, frozen)
    found = method._boundary(state, 0, data)
    reader, key = data.reader, data.key
    copies = np.stack([reference(params(), boundary.masked_copy(
        jnp.asarray(reader.audio), jnp.arange(SIZES[0]), jnp.int32(copy), key,
        params()["audio"]["input_mean"]))[1] for copy in range(5)], 1)
    clean = unit(np.asarray(reference(params(), reader.audio)[1]))
    wrong = boundary.boundary_copies(clean, reader.labels, unit(copies), 0.0)
    pairs = np.argwhere(wrong)
    count = int(found["present"].sum())
    assert 0 < count == min(len(pairs), method.boundary_capacity)
    chosen = list(zip(np.asarray(found["clip"])[:count], np.asarray(found["copy"])[:count]))
    assert set(chosen) <= set(map(tuple, pairs)) and len(set(chosen)) == count
    np.testing.assert_allclose(found["features"][:count], [unit(copies)[i] for i in chosen],
                               atol=1e-4)
    for c in SESSIONS[0]:
        np.testing.assert_allclose(found["means"][c], clean[reader.labels == c].mean(0), atol=1e-5)


def test_loss_is_cross_entropy_among_own_classes_and_the_boundary_term(states):
    seen, _, frozen = states
    method = PACE(**SETTINGS | {"reg_on_fsa": True, "boundary_weight": 0.7})
    state = seen[0, HEAD]
    found = method._boundary(state, 0, data_of(0, 0, frozen))
    state = state | {"aux": state["aux"] | {"boundary": found}}
    batch = {k: jnp.asarray(v) for k, v in list(Reader(0).audio_batches(BATCH))[1].items()}
    assert not batch["mask"].all()

    @functools.partial(jax.jit, static_argnums=0)
    def loss(method, state, batch):
        args = state["trainable"], frozen, state["aux"]
        outputs = method.forward(MODEL, *args, batch, jax.random.key(0))
        return method.objective(MODEL, *args, outputs, batch), outputs

    for active in (False, True):
        found = found | {"active": jnp.asarray(active)}
        state["aux"]["boundary"] = found
        (value, metrics), out = loss(method, state, batch)
        entropy = losses.classification_loss(
            out["logits"], batch["label"], state["aux"]["classes"]["current"], batch["mask"])
        rows = []
        for i in np.flatnonzero(batch["mask"]):
            mine = np.asarray(found["clip"]) == batch["clip_id"][i]
            others = np.asarray(found["features"])[np.asarray(found["present"]) & ~mine]
            f, mu = np.asarray(out["audio"][i]), np.asarray(found["means"])[batch["label"][i]]
            group = np.concatenate([f[None], np.asarray(out["copies"])[i]])
            if active and len(others):
                near = np.square(group - mu).sum(1).mean()
                rows.append(max(0, 1.0 + near - np.square(others - f).sum(1).min()))
        expected = float(entropy) + 0.7 * sum(rows) / int(batch["mask"].sum())
        assert float(value) == pytest.approx(expected, rel=1e-4)
        assert (sum(rows) > 0) == active


# --- The classifier -------------------------------------------------------------------------------


@pytest.mark.parametrize("recursion", [True, False])
def test_classifier_is_joint_ridge_on_features_of_their_sessions(states, recursion):
    seen, _, frozen = states
    if recursion:
        statistics = seen[3, "end"]["statistics"]
    else:  # the same features, summed
        method = PACE(**SETTINGS | {"recursion": False})
        state = method.init(jax.random.key(1), MODEL, params())
        for session in range(4):
            tuned = seen[session, "end"] | {"statistics": state["statistics"]}
            method = PACE(**SETTINGS | {"recursion": False, "first_session": False})
            state = method.end_task(tuned, session, data_of(session, 1, frozen))
        statistics = state["statistics"]
    z = [np.asarray(reference(dense(seen[session, "end"]["aux"]["delta"]),
                              Reader(session).audio)[1], np.float64) for session in range(4)]
    labels = np.concatenate([Reader(session).labels for session in range(4)])
    rows = np.maximum(np.concatenate(z) @ statistics["projection"], 0)
    gamma = float(statistics["gamma"])
    assert np.log10(gamma) == pytest.approx(round(np.log10(gamma)))
    joint = Ridge(alpha=gamma, fit_intercept=False).fit(rows, np.eye(CLASSES)[labels])
    np.testing.assert_allclose(statistics["weights"], joint.coef_.T, atol=2e-4)
    new = np.random.default_rng(0).normal(size=(9, WIDTH))
    scores = METHOD.decide({"statistics": {k: statistics[k] for k in METHOD.decision}}, new)
    np.testing.assert_allclose(
        scores, joint.predict(np.maximum(new @ statistics["projection"], 0)), atol=5e-3)
    assert int(statistics["clips"]) == sum(SIZES)


def test_classes_without_clips_are_never_chosen(states):
    statistics = states[0][1, "end"]["statistics"]
    scores = METHOD.decide({"statistics": statistics}, np.ones((2, WIDTH)))
    seen = np.isin(np.arange(CLASSES), np.concatenate(SESSIONS[:2]))
    assert np.isfinite(scores[:, seen]).all() and np.isneginf(scores[:, ~seen]).all()


def test_scores_are_features_of_each_row_alone(states):
    seen, _, frozen = states
    state, audio = seen[3, "end"], jnp.asarray(Reader(3).audio)
    score = jax.jit(lambda rows: METHOD.scores(MODEL, state["trainable"], frozen, state["aux"],
                                               {"audio": rows}))
    pooled = np.asarray(reference(dense(state["aux"]["delta"]), audio)[1])
    np.testing.assert_allclose(score(audio), pooled, atol=2e-4)
    mixed = audio[jnp.array([3, 0, 3, 4, 3, 3])]
    np.testing.assert_allclose(score(mixed), pooled[[3, 0, 3, 4, 3, 3]], atol=2e-4)


# --- Settings -------------------------------------------------------------------------------------


def test_without_projection_and_boundary_nothing_is_confined_or_encoded_twice(states):
    seen, _, frozen = states
    method = PACE(**SETTINGS | {"project": False, "boundary_weight": 0.0, "warm_up": "",
                                "freeze_head": False, "tune_from": 1})
    state = method.init(jax.random.key(1), MODEL, params())
    assert "boundary" not in state["aux"]
    state = state | {"statistics": seen[0, "end"]["statistics"]}
    state = method.begin_task(with_classes(state, 1), 1, data_of(1, 0, frozen))
    np.testing.assert_array_equal(state["aux"]["projectors"][0], np.eye(WIDTH))
    state = method.begin_stage(state, 1, 0, None)
    assert all(np.all(x) for x in jax.tree.leaves(method.update_mask(state)))
    batch = {k: jnp.asarray(v) for k, v in next(Reader(1).audio_batches(BATCH)).items()}
    outputs = jax.eval_shape(
        lambda: method.forward(MODEL, state["trainable"], frozen, state["aux"], batch, None))
    assert set(outputs) == {"audio", "logits"}


@pytest.mark.parametrize("name, first, second", [
    ("pace_untuned", [], []), ("pace_naive", [ADAPT], []), ("pace_low_head_rate", [ADAPT], []),
    ("pace_all_blocks", [HEAD, ADAPT], []), ("pace_first_session", [PROBE, HEAD, ADAPT], []),
    ("pace_no_boundary", [PROBE, HEAD, ADAPT], [HEAD, ADAPT]),
    ("pace_no_projection", [PROBE, HEAD, ADAPT], [HEAD, ADAPT])])
def test_ablations_of_the_paper_leave_out_what_they_say(name, first, second):
    method = methods.build({"name": name}, 2, CLASSES)
    assert [stage for stage, _ in names(method, 0, [16])] == first
    assert [stage for stage, _ in names(method, 1, [16, 16])] == second
    rates = dict(method.learning_rates())
    assert rates["heads/.*"] == (0.05 if name == "pace_naive" else 0.01)
    assert method.freeze_head == (name not in ("pace_naive", "pace_low_head_rate"))
    assert (method.boundary_weight, method.project) == (
        float(name != "pace_no_boundary"), name != "pace_no_projection")


def test_every_leaf_has_its_rate_and_decay():
    trainable = METHOD.init(jax.random.key(0), MODEL, params())["trainable"]
    rates = apply_rules(trainable, METHOD.learning_rates())
    decays = apply_rules(trainable, METHOD.weight_decays())
    assert rates["lora"]["audio"]["key"] == {"a": 0.05, "b": 0.05}
    assert rates["heads"]["classes"] == {"kernel": 0.01, "bias": 0.01}
    assert decays["heads"]["classes"] == {"kernel": 5e-4, "bias": 0.0}
    assert decays["lora"]["audio"]["value"] == {"a": 5e-4, "b": 5e-4}


@pytest.mark.parametrize("settings, message", [
    ({"cka": "rows"}, "method.cka is 'rows'"), ({"reading": "main"}, "method.reading is 'main'"),
    ({"project_sides": "out"}, "method.project_sides"), ({"rank": 0}, "method.rank is 0"),
    ({"reg_copies_per_step": 21}, "reg_copies_per_step is 21; expected at most method.copies, 20"),
    ({"mask_least": 0.5}, "mask_least and mask_most are 0.5 and 0.3"),
    ({"energy": 1.5}, "method.energy is 1.5"),
    ({"warm_up": ""}, "freeze_head is True and method.warm_up is empty")])
def test_wrong_settings_are_errors_that_name_them(settings, message):
    with pytest.raises(ValueError, match=message):
        PACE(**settings)


def test_what_the_method_cannot_work_on_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="model has no classes"):
        METHOD.init(key, DualEncoder(EATConfig(**TOWER), None), {})
    with pytest.raises(ValueError, match="model.audio is HTSAT"):
        METHOD.init(key, DualEncoder(HTSATConfig(), None, classes=3), {})
    with pytest.raises(ValueError, match="method.tune_from is 4; expected at most 3"):
        PACE(tune_from=4).init(key, MODEL, {})


def test_a_pre_norm_tower_runs_through_two_sessions():
    method = PACE(**SETTINGS | {"cka": "pooled_debiased", "scale": 0.5, "project_sides": "both",
                                "reg_copies_per_step": 2})
    seen, step, _ = run(method, 2, AST, "ast", epochs=2)
    assert step.traces == 1
    similarity = seen[0, "end"]["statistics"]["similarity"]
    assert (similarity > 0.5).all() and (similarity < 1).all()
    state = seen[1, ADAPT]
    first = int(state["aux"]["first_block"]) - 1
    assert first + 1 == depth.first_below(similarity, method.layer_threshold)
    p = np.asarray(state["aux"]["projectors"], np.float64)[first:]
    a = np.asarray(state["trainable"]["lora"]["audio"]["key"]["a"], np.float64)[first:]
    assert np.linalg.norm(a - p @ a) <= 1e-6 * np.linalg.norm(a)
    lora = seen[0, ADAPT]["trainable"]["lora"]["audio"]["value"]
    np.testing.assert_allclose(seen[0, "end"]["aux"]["delta"][:, 1],
                               0.5 * np.asarray(lora["a"]) @ np.asarray(lora["b"]), atol=1e-6)


def test_boundary_is_encoded_anew_in_each_epoch_under_the_model_of_then(states):
    seen, _, frozen = states
    state, data = seen[1, ADAPT], data_of(1, 0, frozen)
    before = state["aux"]["boundary"]
    after = METHOD.begin_epoch(state, data)["aux"]["boundary"]
    moved = dense(state["aux"]["delta"], state["trainable"]["lora"]["audio"])
    clean = unit(np.asarray(reference(moved, data.reader.audio)[1]))
    for c in SESSIONS[1]:
        np.testing.assert_allclose(after["means"][c], clean[data.labels == c].mean(0), atol=1e-4)
    for name in ("clip", "copy", "present", "key"):  # the same copies, as they are now
        np.testing.assert_array_equal(after[name], before[name])
    here = np.flatnonzero(before["present"])
    rows, copies = np.asarray(before["clip"])[here], np.asarray(before["copy"])[here]
    masked = boundary.masked_copy(jnp.asarray(data.reader.audio[rows]), jnp.asarray(rows),
                                  jnp.asarray(copies), data.key, params()["audio"]["input_mean"])
    expected = unit(np.asarray(reference(moved, masked)[1]))
    np.testing.assert_allclose(np.asarray(after["features"])[here], expected, atol=1e-4)
    assert np.abs(np.asarray(before["features"])[here] - expected).max() > 1e-4
    for held in (PACE(**SETTINGS | {"boundary_refresh": False}), METHOD):
        inactive = state if held is not METHOD else seen[1, HEAD]
        assert held.begin_epoch(inactive, data) is inactive
