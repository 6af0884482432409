"""Prompts, prefixes, adapters and LoRA in the transformer stack, against literal versions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tail_jax.models.htsat import HTSATConfig, HTSATTower, SwinBlock
from tail_jax.models.transformer import Block, BlockConfig, Stack

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, HEADS, HIDDEN, LAYERS, BATCH, TOKENS = 12, 3, 20, 3, 4, 7
CONFIGS = {norm: BlockConfig(WIDTH, HEADS, HIDDEN, norm) for norm in ("pre", "post")}
MASK = np.arange(TOKENS) < np.array([7, 3, 5, 1])[:, None]
BOTH = pytest.mark.parametrize("norm", ["pre", "post"])
EITHER = pytest.mark.parametrize("batched", [False, True], ids=["shared", "per_example"])


def randomised(tree, seed):
    """A tree of the same shapes, all values random (norm scales around 1)."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (rng.normal(0, 0.3, x.shape) + (path[-1].key == "scale")).astype("float32"),
        tree)


@functools.cache
def stack(norm):
    """(apply, params, tokens) of a small random stack."""
    module = Stack(CONFIGS[norm], LAYERS)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, TOKENS, WIDTH)), jnp.float32)
    params = randomised(jax.eval_shape(module.init, jax.random.key(0), x)["params"], 2)
    apply = jax.jit(lambda *args: module.apply(*args)[1])
    run = lambda tuning=None, x=x, mask=MASK, params=params: np.asarray(
        apply({"params": params}, x, jnp.asarray(mask), tuning))
    return run, params, x


def make_tuning(kind, layers, width, hidden, seed, batch=()):
    """Random tuning of one kind in the format of the stack."""
    rng = np.random.default_rng(seed)
    new = lambda *shape: jnp.asarray(rng.normal(0, 0.5, (*batch, layers, *shape)), jnp.float32)
    sizes = {"up": (width, hidden), "down": (hidden, width)}
    return {
        "prompts": lambda: {"prompts": new(5, width)},
        "prefix": lambda: {"prefix": {"key": new(2, width), "value": new(2, width)}},
        "adapter": lambda: {"adapter": {"down": {"kernel": new(width, 3), "bias": new(3)},
                                        "up": {"kernel": new(3, width), "bias": new(width)},
                                        "scale": new()}},
        "lora": lambda: {"lora": {
            name: {"a": new(i, 2), "b": new(2, o)} for name in
            ("query", "key", "value", "out", "up", "down")
            for i, o in [sizes.get(name, (width, width))]}},
        "all": lambda: {k: v for i, one in enumerate(("prompts", "prefix", "adapter", "lora"))
                        for k, v in make_tuning(one, layers, width, hidden, seed + i,
                                                batch).items()},
    }[kind]()


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


@functools.cache
def block(norm):
    """The block as a compiled function of (params, tokens, bias, mask): no tuning in it."""
    return jax.jit(lambda params, *args: Block(CONFIGS[norm]).apply({"params": params}, *args))


# --- Prompts ---------------------------------------------------------------------------------


@BOTH
@EITHER
def test_deep_prompts_equal_inserting_and_dropping_tokens_at_every_layer(norm, batched):
    run, params, x = stack(norm)
    prompts = make_tuning("prompts", LAYERS, WIDTH, HIDDEN, 3, (BATCH,) * batched)["prompts"]
    n = prompts.shape[-2]
    mask = jnp.concatenate([jnp.ones((BATCH, n), bool), MASK], 1)[:, None, None, :]
    for i in range(LAYERS):
        own = jnp.broadcast_to(prompts[..., i, :, :], (BATCH, n, WIDTH))
        x = block(norm)(params[f"layer_{i:02d}"], jnp.concatenate([own, x], 1), None, mask)[:, n:]
    close(run({"prompts": prompts}), x)
    assert np.abs(run({"prompts": prompts}) - run()).max() > 0.05


@BOTH
@EITHER
def test_shallow_prompts_enter_once_and_flow_on(norm, batched):
    run, params, x = stack(norm)
    deep = make_tuning("prompts", LAYERS, WIDTH, HIDDEN, 4, (BATCH,) * batched)["prompts"]
    shallow = deep[..., :1, :, :]
    n = deep.shape[-2]
    x = jnp.concatenate([jnp.broadcast_to(shallow[..., 0, :, :], (BATCH, n, WIDTH)), x], 1)
    mask = jnp.concatenate([jnp.ones((BATCH, n), bool), MASK], 1)[:, None, None, :]
    for i in range(LAYERS):
        x = block(norm)(params[f"layer_{i:02d}"], x, None, mask)
    close(run({"prompts": shallow}), x[:, n:])
    repeated = jnp.repeat(shallow, LAYERS, axis=-3)
    for other in (deep, repeated):
        assert np.abs(run({"prompts": shallow}) - run({"prompts": other})).max() > 0.05


@BOTH
def test_order_of_prompts_does_not_matter(norm):
    run, _, _ = stack(norm)
    prompts = make_tuning("prompts", LAYERS, WIDTH, HIDDEN, 5)["prompts"]
    close(run({"prompts": prompts}), run({"prompts": prompts[:, ::-1]}), 1e-5)


@BOTH
def test_closed_prompts_are_no_prompts(norm):
    run, _, _ = stack(norm)
    prompts = make_tuning("prompts", LAYERS, WIDTH, HIDDEN, 6)["prompts"]
    closed = jnp.zeros(prompts.shape[:2], bool)
    close(run({"prompts": prompts, "prompts_mask": closed}), run())
    # Closing some equals leaving those out.
    some = closed.at[:, 1:4].set(True)
    close(run({"prompts": prompts, "prompts_mask": some}), run({"prompts": prompts[:, 1:4]}))


@BOTH
@EITHER
def test_closed_prefixes_are_no_prefixes(norm, batched):
    run, _, _ = stack(norm)
    prefix = make_tuning("prefix", LAYERS, WIDTH, HIDDEN, 7, (BATCH,) * batched)["prefix"]
    closed = jnp.zeros((LAYERS, 2), bool)
    close(run({"prefix": prefix, "prefix_mask": closed}), run())
    first = {k: v[..., :1, :] for k, v in prefix.items()}
    close(run({"prefix": prefix, "prefix_mask": closed.at[:, 0].set(True)}),
          run({"prefix": first}))


# --- The other three, against formulas --------------------------------------------------------


def reference_block(p, x, mask, norm, prefix=None, adapter=None):
    """One block on one example [S, d] in NumPy, float64, head by head."""
    dense = lambda name, y: y @ p[name]["kernel"] + p[name]["bias"]

    def layer_norm(name, y):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        return y * p[name]["scale"] + p[name]["bias"]

    def attend(y):
        query, key, value = (dense(name, y) for name in ("query", "key", "value"))
        shown = mask
        if prefix is not None:
            key = np.concatenate([prefix["key"], key])
            value = np.concatenate([prefix["value"], value])
            shown = np.concatenate([np.ones(len(prefix["key"]), bool), mask])
        heads, d = [], WIDTH // HEADS
        for h in range(HEADS):
            s = slice(h * d, (h + 1) * d)
            weight = np.exp(query[:, s] @ key[:, s].T / np.sqrt(d)) * shown
            heads.append(weight / weight.sum(1, keepdims=True) @ value[:, s])
        return dense("out", np.concatenate(heads, 1))

    def feed_forward(y):
        y = dense("up", y)
        return dense("down", 0.5 * y * (1 + erf(y / np.sqrt(2))))

    def adapt(y):
        if adapter is None:
            return 0.0
        z = np.maximum(y @ adapter["down"]["kernel"] + adapter["down"]["bias"], 0)
        return adapter["scale"] * (z @ adapter["up"]["kernel"] + adapter["up"]["bias"])

    if norm == "pre":
        h = x + attend(layer_norm("norm1", x))
        return h + feed_forward(layer_norm("norm2", h)) + adapt(h)
    h = layer_norm("norm1", x + attend(x))
    return layer_norm("norm2", h + feed_forward(h) + adapt(h))


@BOTH
@EITHER
@pytest.mark.parametrize("kind", ["none", "prefix", "adapter"])
def test_stack_equals_formulas_in_numpy(norm, batched, kind):
    run, params, x = stack(norm)
    tuning = {} if kind == "none" else make_tuning(kind, LAYERS, WIDTH, HIDDEN, 7,
                                                   (BATCH,) * batched)
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    expected = []
    for b in range(BATCH):
        y = np.asarray(x[b], np.float64)
        for i in range(LAYERS):
            own = jax.tree.map(lambda v: np.asarray(v[b, i] if batched else v[i], np.float64),
                               tuning)
            y = reference_block(params[f"layer_{i:02d}"], y, MASK[b], norm, **own)
        expected.append(y)
    close(run(tuning), np.stack(expected), 5e-5)


@BOTH
@EITHER
@pytest.mark.parametrize("prompted", [False, True])
def test_lora_equals_merged_weights(norm, batched, prompted):
    run, params, x = stack(norm)
    lora = make_tuning("lora", LAYERS, WIDTH, HIDDEN, 8, (BATCH,) * batched)["lora"]
    prompts = {"prompts": make_tuning("prompts", LAYERS, WIDTH, HIDDEN, 9)["prompts"]}
    prompts = prompts if prompted else {}
    got = run({"lora": lora} | prompts)
    for b in range(BATCH):
        merged = jax.tree.map(np.copy, params)
        for i in range(LAYERS):
            for name, f in lora.items():
                low, high = (f[k][b, i] if batched else f[k][i] for k in ("a", "b"))
                merged[f"layer_{i:02d}"][name]["kernel"] += np.asarray(low @ high)
        close(got[b], run(prompts, params=merged, x=x[b:b + 1], mask=MASK[b:b + 1])[0], 1e-4)


@BOTH
def test_zero_initialised_lora_and_adapter_change_nothing(norm):
    run, _, _ = stack(norm)
    tuning = make_tuning("all", LAYERS, WIDTH, HIDDEN, 10)
    zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    for f in tuning["lora"].values():
        f["b"] = zero(f["b"])
    assert (run({"lora": tuning["lora"]}) == run()).all()
    adapter = tuning["adapter"]
    assert (run({"adapter": adapter | {"scale": zero(adapter["scale"])}}) == run()).all()
    assert (run({"adapter": adapter | {"up": zero(adapter["up"])}}) == run()).all()


# --- The batch axis ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kind", ["prompts", "prefix", "adapter", "lora", "all"])
def test_per_example_tuning_gives_each_row_its_own(norm, kind):
    run, _, x = stack(norm)
    tuning = make_tuning(kind, LAYERS, WIDTH, HIDDEN, 11, (BATCH,))
    got = run(tuning)
    for b in range(BATCH):
        own = jax.tree.map(lambda v: v[b], tuning)
        close(got[b], run(own, x=x[b:b + 1], mask=MASK[b:b + 1])[0])


# --- HTSAT windows ----------------------------------------------------------------------------

WINDOW = 2


def literal_swin(params, x, prompts, shifted):
    """Shifted-window attention with prompts put into every window and dropped, by loops."""
    grid, (shift, n) = x.shape[1:3], (WINDOW // 2 if shifted else 0, prompts.shape[1])
    full = [-(-side // WINDOW) * WINDOW for side in grid]
    places = [[((r * WINDOW + i), (c * WINDOW + j)) for i in range(WINDOW) for j in range(WINDOW)]
              for r in range(full[0] // WINDOW) for c in range(full[1] // WINDOW)]
    filled = np.zeros((x.shape[0], *full, WIDTH), np.float32)
    filled[:, :grid[0], :grid[1]] = x
    table, out = np.asarray(params["relative_position_bias"]), np.array(filled)
    for window in places:
        # Where the tokens of this window of the rolled grid stand in the grid itself.
        home = [((i + shift) % full[0], (j + shift) % full[1]) for i, j in window]
        wrapped = [(i + shift >= full[0], j + shift >= full[1]) for i, j in window]
        bias = np.zeros((HEADS, n + len(window), n + len(window)), np.float32)
        mask = np.ones((n + len(window), n + len(window)), bool)
        for q, (qi, qj) in enumerate(window):
            for k, (ki, kj) in enumerate(window):
                row = (qi - ki + WINDOW - 1) * (2 * WINDOW - 1) + qj - kj + WINDOW - 1
                bias[:, n + q, n + k] = table[row]
                mask[n + q, n + k] = wrapped[q] == wrapped[k]
        present = [True] * n + [i < grid[0] and j < grid[1] for i, j in home]
        rows, columns = np.array(home).T
        y = jnp.concatenate([prompts, filled[:, rows, columns]], 1)
        y = block("pre")(params["block"], y, bias, mask, None, True, np.array(present)[:, None])
        out[:, rows, columns] = np.asarray(y[:, n:])
    return out[:, :grid[0], :grid[1]]


@EITHER
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (6, 3)], ids=["square", "odd", "flat"])
def test_prompts_in_windows_equal_inserting_tokens_in_every_window(grid, shifted, batched):
    module = SwinBlock(CONFIGS["pre"], grid, WINDOW, shifted)
    x = jnp.asarray(np.random.default_rng(12).normal(size=(2, *grid, WIDTH)), jnp.float32)
    params = randomised(jax.eval_shape(module.init, jax.random.key(0), x)["params"], 13)
    prompts = make_tuning("prompts", 2 if batched else 1, WIDTH, HIDDEN, 14)["prompts"]
    own = prompts[:, None] if batched else prompts[0]
    got = jax.jit(module.apply)({"params": params}, x, {"prompts": own})
    close(got, literal_swin(params, x, jnp.broadcast_to(prompts, (2, *prompts.shape[1:])),
                            shifted))


# Windows of 3 on grids of 8 and 4: filled up, so every kind of tuning meets what fills them.
HTSAT = HTSATConfig(spec_size=16, mels=8, patch=2, width=8, depths=(2, 2), heads=(2, 2), window=3)


@functools.cache
def htsat():
    module = HTSATTower(HTSAT)
    audio = np.random.default_rng(15).normal(size=(3, HTSAT.frames, 8)).astype(np.float32)
    params = randomised(jax.eval_shape(module.init, jax.random.key(0), audio)["params"], 16)
    params["input_norm"]["running_var"] = np.full(8, 1.5, np.float32)
    apply = jax.jit(lambda *args: module.apply(*args)["pooled"])
    return lambda tuning, rows=slice(None): np.asarray(
        apply({"params": params}, audio[rows], None, tuning))


def stages(kind, batch=()):
    trees = [make_tuning(kind, d, w, 4 * w, 17 + w, batch) for d, w in HTSAT.layer_widths]
    return jax.tree.map(lambda *leaves: list(leaves), *trees)


@pytest.mark.parametrize("kind", ["prompts", "all"])
def test_per_example_tuning_gives_each_clip_its_own_in_htsat(kind):
    run, tuning = htsat(), stages(kind, (3,))
    got = run(tuning)
    assert np.abs(got - run(None)).max() > 0.01
    for b in range(3):
        close(got[b:b + 1], run(jax.tree.map(lambda v: v[b], tuning), slice(b, b + 1)))


def test_closed_prompts_are_no_prompts_in_htsat():
    tuning = stages("prompts")
    tuning["prompts_mask"] = [jnp.zeros(p.shape[:2], bool) for p in tuning["prompts"]]
    close(htsat()(tuning), htsat()(None), 1e-5)


# --- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompts", "prefix", "adapter", "lora"])
@EITHER
def test_wrong_layer_count_is_an_error_that_names_the_leaf(kind, batched):
    tuning = make_tuning(kind, LAYERS + 1, WIDTH, HIDDEN, 18, (BATCH,) * batched)
    with pytest.raises(ValueError, match=rf"tuning {kind}.*expected \[{LAYERS} layers"):
        stack("pre")[0](tuning)
    wrong = jax.tree.map(lambda v: [v, v], tuning)
    with pytest.raises(ValueError, match=rf"tuning {kind}.*expected \[2 layers"):
        htsat()(wrong)


def test_shallow_prompts_in_htsat_are_an_error():
    tuning = {"prompts": [p[:1] for p in stages("prompts")["prompts"]]}
    with pytest.raises(ValueError, match="expected .2 layers"):
        htsat()(tuning)


def test_htsat_wants_one_entry_a_stage():
    with pytest.raises(ValueError, match="3 entries; HTSAT has 2"):
        htsat()({"prompts": stages("prompts")["prompts"] + [None]})


@pytest.mark.parametrize("tuning, found", [
    ({"promts": jnp.zeros((LAYERS, 1, WIDTH))}, "promts"),
    ({"lora": {"querry": {"a": 0, "b": 0}}}, "querry"),
    ({"prefix": jnp.zeros((LAYERS, 1, WIDTH))}, "prefix")])
def test_unknown_tuning_is_an_error_that_names_it(tuning, found):
    with pytest.raises(ValueError, match=found):
        stack("pre")[0](tuning)


# --- tokens computed alone ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", ["none", "all", "shallow"])
def test_chosen_tokens_are_those_of_the_whole_and_cheaper(norm, kind):
    _, params, x = stack(norm)
    module, chosen = Stack(CONFIGS[norm], LAYERS), jnp.asarray([[3, 0]] * BATCH).at[0, 0].set(1)
    tuning = {} if kind == "none" else make_tuning(
        "all" if kind == "all" else "prompts", LAYERS if kind == "all" else 1, WIDTH,
        CONFIGS[norm].hidden, 5)
    run = lambda output: jax.jit(lambda params: output(*module.apply(
        {"params": params}, x, jnp.asarray(MASK), tuning, True, chosen)))
    whole = np.asarray(run(lambda hidden, *_: hidden[-1])(params))
    alone = np.asarray(run(lambda _, alone, prompts: alone)(params))
    np.testing.assert_allclose(alone, whole[np.arange(BATCH)[:, None], chosen], atol=1e-5)
    flops = lambda output: run(output).lower(params).compile().cost_analysis()["flops"]
    every = flops(lambda hidden, *_: hidden[-1])
    assert flops(lambda _, alone, prompts: alone) < 0.95 * every
    assert kind != "shallow" or flops(lambda *out: out[2]) < 0.95 * every


@EITHER
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_shallow_prompts_come_out_as_tokens_would_that_stand_before_the_others(norm, batched):
    run, params, x = stack(norm)
    module = Stack(CONFIGS[norm], LAYERS)
    prompts = make_tuning("prompts", 1, WIDTH, 0, 6, (BATCH,) if batched else ())["prompts"]
    got = jax.jit(lambda: module.apply({"params": params}, x, jnp.asarray(MASK),
                                       {"prompts": prompts})[2])()
    first = np.broadcast_to(prompts.reshape(-1, 5, WIDTH), (BATCH, 5, WIDTH))
    before = np.pad(MASK, [(0, 0), (5, 0)], constant_values=True)
    expected = run(x=jnp.concatenate([first, x], 1), mask=before)[:, :5]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert module.apply({"params": params}, x)[2].shape == (BATCH, 0, WIDTH)
