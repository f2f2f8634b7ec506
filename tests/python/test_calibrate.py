"""Calibration: its arithmetic against direct formulas, and a real engine against transformers."""

import math

import pytest
import torch
from kakeya_vllm import calibrate, engine
from kakeya_vllm.calibrate import BLOCK, SKIPPED_POSITIONS, LayerStatistics, Unrotation, hadamard
from kakeya_vllm.rope import Rope


@pytest.mark.parametrize("size", [1, 2, 64, 96, 128, 80])
def test_hadamard_is_orthonormal(size):
    h = hadamard(size)
    assert h.shape == (size, size)
    torch.testing.assert_close(h @ h.T, torch.eye(size, dtype=torch.float64))


def test_hadamard_is_in_sylvester_order():
    h = hadamard(4) * 2
    assert h.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    # 96 = 3 blocks of 32: no element crosses a block.
    assert hadamard(96)[:32, 32:].abs().max() == 0


SCALE = 0.25
# A destroyed in-process engine takes down process groups that engines of later tests share.
KEPT = []


def rotate(rows, rope):
    """RoPE written the slow way, one pair at a time."""
    out = rows.clone()
    for p in range(rows.shape[0]):
        for i, frequency in enumerate(rope.inv_freq):
            half = rope.rotary_dim // 2
            a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
            c, s = math.cos(p * frequency), math.sin(p * frequency)
            out[p, :, a] = rows[p, :, a] * c - rows[p, :, b] * s
            out[p, :, b] = rows[p, :, a] * s + rows[p, :, b] * c
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_unrotation_undoes_rope(interleaved, rotary_dim):
    rope = Rope(rotary_dim, interleaved, tuple(10.0**-i for i in range(rotary_dim // 2)))
    rows = torch.randn(50, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unrotate = Unrotation(rope, 8, "cpu")
    torch.testing.assert_close(unrotate(rotate(rows, rope)), rows)
    slow = unrotate.channel_frequency
    assert (slow == 0).sum() == 8 - rotary_dim
    first, second = (0, 1) if interleaved else (0, rotary_dim // 2)
    assert slow[first] == slow[second] == 1.0


def test_model_without_rope_passes_through():
    rows = torch.randn(5, 2, 8)
    unrotate = Unrotation(None, 8, "cpu")
    assert torch.equal(unrotate(rows), rows.double())
    assert not unrotate.channel_frequency.any()


def synthetic(passages, heads=2, group=3, dim=16):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scale = torch.linspace(0.5, 2, dim)
    return [
        (
            draw(2 * BLOCK, heads * group * dim) + 0.3,
            (draw(2 * BLOCK, heads, dim) * scale + scale).flatten(1),
            draw(2 * BLOCK, heads * dim) - 1,
        )
        for _ in range(passages)
    ]


def run_statistics(data, heads=2, group=3, dim=16):
    unrotate = Unrotation(None, dim, "cpu")
    statistics = LayerStatistics(heads, heads * group, dim, unrotate, SCALE, "cpu")
    for q, _, _ in data:
        statistics.first_pass(q)
    statistics.start_second_pass()
    for q, k, v in data:
        statistics.second_pass(q, k, v)
    return statistics.result()


def test_statistics_equal_direct_formulas():
    heads, group, dim = 2, 3, 16
    data = synthetic(3)
    got = run_statistics(data)
    for head in range(heads):
        q = torch.cat([q.view(-1, heads, group, dim)[SKIPPED_POSITIONS:, head] for q, _, _ in data])
        q = q.reshape(-1, dim).double()
        torch.testing.assert_close(got["q_mean"][head], q.mean(0))
        torch.testing.assert_close(got["q_sq"][head], q.square().mean(0))
        keys, values = [], []
        mass = torch.zeros(calibrate.SINK_RANKS, dtype=torch.float64)
        for q3, k, v in data:
            queries = q3.view(-1, heads, group, dim)[:, head].double()
            k = k.view(-1, heads, dim)[:, head].double()
            v = v.view(-1, heads, dim)[:, head].double() @ hadamard(dim)
            score = k @ q.mean(0)
            positions = range(len(k) // 2 + 64, len(k), 64)
            attention = torch.zeros(len(k), dtype=torch.float64)
            for p in positions:
                for member in range(group):
                    seen = (k[: p + 1] @ queries[p, member] * SCALE).softmax(0)
                    attention[: p + 1] += seen / (len(positions) * group)
            for start in range(0, len(k), BLOCK):
                block = start + score[start : start + BLOCK].argsort(descending=True)
                mass += attention[block[: calibrate.SINK_RANKS]] / len(data)
                ordinary = block[block >= SKIPPED_POSITIONS][1:]
                keys.append(k[ordinary])
                values.append(v[ordinary])
        keys, values = torch.cat(keys), torch.cat(values)
        torch.testing.assert_close(got["k_mean"][head], keys.mean(0))
        torch.testing.assert_close(got["k_var"][head], keys.var(0, correction=0))
        torch.testing.assert_close(got["v_mean"][head], values.mean(0))
        torch.testing.assert_close(got["v_var"][head], values.var(0, correction=0))
        torch.testing.assert_close(got["sink_mass"][head], mass)


def test_a_sink_is_found_and_does_not_stretch_the_rest():
    data = synthetic(2)
    clean = run_statistics(data)
    for _, k, _ in data:
        # Far along the mean query, which is +0.3 in every channel.
        k.view(-1, 2, 16)[[BLOCK // 2, BLOCK + 5]] += 40
    got = run_statistics(data)
    torch.testing.assert_close(got["k_var"], clean["k_var"], rtol=0.1, atol=0)
    # Most queries look along the mean one, and the two sinks rank first in their blocks.
    assert (clean["sink_mass"][:, 0] < 0.1).all()
    assert (got["sink_mass"][:, 0] > 0.5).all()
    assert (got["sink_mass"][:, 1:].sum(-1) < 0.1).all()


def test_statistics_that_are_not_finite_are_refused():
    with pytest.raises(SystemExit, match="k_var of this model is not finite"):
        calibrate.check({"k_mean": torch.zeros(2), "k_var": torch.tensor([1.0, float("nan")])})


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    import engines

    return engines.make_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_engine_capture_equals_transformers(tiny_model):
    """Means and variances of K and V of a real vLLM engine against transformers' projections."""
    import engines
    from transformers import AutoModelForCausalLM

    passages = [engines.tokens(seed, 4 * BLOCK) for seed in (1, 2)]
    llm = engine.in_process_engine(
        str(tiny_model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_batched_tokens=4 * BLOCK,
        max_model_len=1024,
        kv_cache_memory_bytes=engines.KV_BYTES,
    )
    KEPT.append(llm)
    got, shape = calibrate.collect(llm, passages)
    again, _ = calibrate.collect(llm, passages)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert shape == {
        "tokens": "1024",
        "num_layers": "4",
        "num_kv_heads": "2",
        "num_q_heads": "4",
        "head_dim": "128",
    }

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    seen = {}
    for i, layer in enumerate(model.model.layers):
        for name in ("q", "k", "v"):
            getattr(layer.self_attn, f"{name}_proj").register_forward_hook(
                lambda _m, _a, out, key=(i, name): seen.setdefault(key, []).append(out[0])
            )
    with torch.inference_mode():
        for passage in passages:
            model(torch.tensor([passage]))
    for i in range(4):
        q, k, v = (torch.stack(seen[i, n]).double()[:, SKIPPED_POSITIONS:] for n in ("q", "k", "v"))
        q = q.reshape(-1, 2, 2, 128).transpose(1, 2).reshape(-1, 2, 128)
        torch.testing.assert_close(
            got["q_sq"][i].double(), q.square().mean(0), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(got["q_mean"][i].double(), q.mean(0), rtol=1e-3, atol=1e-3)
        # Of 1,008 tokens, the 8 that stand out are left out: close to, not equal to the plain mean.
        k = k.reshape(-1, 2, 128)
        torch.testing.assert_close(got["k_mean"][i].double(), k.mean(0), rtol=0.02, atol=0.05)
        v = v.reshape(-1, 2, 128) @ hadamard(128)
        torch.testing.assert_close(got["v_var"][i].double(), v.var(0), rtol=0.1, atol=0.01)
