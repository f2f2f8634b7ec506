"""Calibration: its arithmetic against direct formulas, and a real engine against transformers."""

import json
import math
import os

import pytest
import torch
from kakeya_vllm import calibrate, engine, heldout, lib
from kakeya_vllm.calibrate import BLOCK, SKIPPED_POSITIONS, LayerStatistics, Unrotation, hadamard
from kakeya_vllm.progress import Progress, weights_digest
from kakeya_vllm.rope import Rope
from safetensors import safe_open
from safetensors.torch import load


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


def test_sums_come_back_bit_by_bit():
    """Half of the passages in one object, the rest in another that took over its sums."""
    data = synthetic(4)
    make = lambda: LayerStatistics(2, 6, 16, Unrotation(None, 16, "cpu"), SCALE, "cpu")  # noqa: E731
    statistics = make()
    for second in (False, True):
        if second:
            statistics.start_second_pass()
        for i, (q, k, v) in enumerate(data):
            if i == 2:
                sums = {name: tensor.clone() for name, tensor in statistics.sums().items()}
                statistics = make()
                statistics.restore(sums)
                if second:
                    statistics.start_second_pass()
            statistics.second_pass(q, k, v) if second else statistics.first_pass(q)
    expected, got = run_statistics(data), statistics.result()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_channels_that_stand_still_get_a_least_variance():
    tensors = {name: torch.full((1, 3, 4), 2.0) for name in ("k_var", "v_var", "q_sq")}
    tensors["k_var"][0, 0] = torch.tensor([0.0, 1e-9, 4.0, 4.0])
    tensors["k_var"][0, 1] = torch.tensor([0.0, 0.0, 0.0, 8.0])  # median 0: the mean is taken
    tensors["k_var"][0, 2] = 0.0
    assert calibrate.regularise(tensors) == 5
    least = calibrate.LEAST_SHARE
    assert tensors["k_var"][0, 0, :2].tolist() == pytest.approx([least * 4.0] * 2)
    assert tensors["k_var"][0, 1].tolist() == pytest.approx([least * 2.0] * 3 + [8.0])
    assert not tensors["k_var"][0, 2].any()
    assert calibrate.regularise(tensors) == 0


def test_partial_files_of_others_and_broken_ones_are_thrown_away(tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    state = {"mass": torch.rand(2, 3, dtype=torch.float64), "count": torch.tensor([1.0, 2.0])}
    progress = Progress(target, "key")
    assert progress.load(state) is None
    progress.save(True, 3, state)
    second, done, found = progress.load(state)
    assert (second, done) == (True, 3)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert "3 passages of pass 2" in capsys.readouterr().out

    def spoil(words, data=None, key="key", state=state):
        progress.save(False, 1, state)
        if data is not None:
            progress.path.write_bytes(data)
        wanted = {"mass": torch.zeros(2, 3, dtype=torch.float64), "count": torch.zeros(2)}
        assert Progress(target, key).load(wanted) is None
        assert words in capsys.readouterr().out
        assert not progress.path.exists()

    whole = progress.path.read_bytes()
    spoil("another model, text or version", key="other")
    spoil("is not used and is removed", whole[: len(whole) // 2])
    spoil("is not used and is removed", b"")
    spoil("mass is torch.float64 [2, 4]", state=state | {"mass": torch.zeros(2, 4).double()})
    spoil("count is not finite", state=state | {"count": torch.tensor([1.0, float("nan")])})
    assert list(tmp_path.iterdir()) == []


def test_weights_are_told_apart():
    a, b = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    assert weights_digest(a) == weights_digest(a) != weights_digest(b)


def test_recipes_of_ratios_and_their_twins():
    assert heldout.recipe_of_ratio(4.0) == "kakeya-4.0x"
    library = lib.load()
    for ratio in (4.0, 4.65, 5.0):
        recipe = heldout.recipe_of_ratio(ratio)
        about, twin = (library.recipe_describe(r) for r in (recipe, heldout.free_twin(recipe)))
        assert about["ratio"] == twin["ratio"] == ratio
        assert about["needs_calibration"]
        assert not twin["needs_calibration"]
    twin = library.recipe_describe(heldout.free_twin("kakeya-5.3x"))
    preset = library.recipe_describe("kakeya-free-5.3x")
    assert {k: v for k, v in twin.items() if k != "name"} == {
        k: v for k, v in preset.items() if k != "name"
    }
    with pytest.raises(lib.KakeyaError, match="valid"):
        heldout.recipe_of_ratio(40.0)


def test_channels_of_a_pair_share_their_weight():
    """Against queries that were really turned back by every distance."""
    rope = Rope(4, False, (1.0, 1e-5))
    unrotate = Unrotation(rope, 6, "cpu")
    q_sq = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    weight = heldout.weight_of_channels(q_sq, unrotate)
    for channel, partner, frequency in ((0, 2, 1.0), (2, 0, 1.0), (1, 3, 1e-5)):
        angles = [d * frequency for d in range(heldout.QUERY_SPAN)]
        share = sum(math.cos(a) ** 2 for a in angles) / len(angles)
        expected = share * q_sq[0, channel] + (1 - share) * q_sq[0, partner]
        assert float(weight[0, channel]) == pytest.approx(float(expected), rel=1e-6)
    assert weight[0, 4:].tolist() == [5.0, 6.0]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    import engines

    return engines.make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("backend", "invariant"), [(None, None), ("environment", "1")])
def test_a_measuring_engine_is_not_batch_invariant(monkeypatch, backend, invariant):
    """vLLM's batch-invariant products on a GPU take no float64."""
    import vllm

    for name in ("VLLM_BATCH_INVARIANT", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "1")  # the engine changes both; they are restored
    made = lambda **_: os.environ.get("VLLM_BATCH_INVARIANT")  # noqa: E731
    monkeypatch.setattr(vllm, "LLM", made, raising=False)
    assert engine.in_process_engine("model", backend) == invariant


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
    got, shape = calibrate.collect(llm, calibrate.capture_of(llm), passages)
    again, _ = calibrate.collect(llm, calibrate.capture_of(llm), passages)
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


class Interrupted(Exception):
    pass


def read(path):
    """Metadata and the bytes of every tensor."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
    return about, {name: t.numpy().tobytes() for name, t in load(path.read_bytes()).items()}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A tiny model with a tokenizer, and one engine that all calibrations of it run in."""
    import engines

    path = engines.make_tiny_model(tmp_path_factory.mktemp("served"))
    engines.add_byte_tokenizer(path)
    llm = engine.in_process_engine(
        str(path), dtype="float32", kv_cache_memory_bytes=engines.KV_BYTES
    )
    KEPT.append(llm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "in_process_engine", lambda *_a, **_k: llm)
        yield str(path)


def test_interrupted_and_resumed_equals_run_through(served, tmp_path, monkeypatch, capsys):
    """Two passages, two passes: interrupted after each of the first three, resumed, and nothing in
    the artefact differs. (The file's bytes may: safetensors writes metadata in any order.)"""
    tokens = 2 * engine.CHUNK
    whole = read(calibrate.calibrate(served, None, tokens, tmp_path / "whole"))
    out = capsys.readouterr().out
    assert "attention's output" in out
    assert "serves every recipe and ratio" in out
    run = calibrate.Capture.run
    target = tmp_path / "parts"
    for done in (1, 2, 3):
        ran = []

        def interrupted(self, llm, passage, ran=ran):
            if ran:
                raise Interrupted
            ran.append(run(self, llm, passage))

        monkeypatch.setattr(calibrate.Capture, "run", interrupted)
        with pytest.raises(Interrupted):
            calibrate.calibrate(served, None, tokens, target)
        assert not target.exists()
        said = capsys.readouterr().out
        assert ("going on from" in said) == (done > 1)
    assert "2 passages of pass 1 are done" in said
    monkeypatch.setattr(calibrate.Capture, "run", run)
    parts = read(calibrate.calibrate(served, None, tokens, target))
    assert parts == whole
    assert "1 passages of pass 2 are done" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "whole"]

    about, _ = whole
    assert about["split"] == "validation"
    assert about["tokens"] == str(tokens)
    held_out = json.loads(about["held_out"])
    assert held_out["recipe"] == "kakeya-4.6x"
    assert set(held_out["streams"]) == {"output", "k_seen", "k", "v"}
    for stream in held_out["streams"].values():
        for errors in stream.values():
            assert len(errors["by_layer"]) == 4
            assert 0 < errors["mean"] <= errors["worst"] == max(errors["by_layer"]) < 1


def test_random_tokens_need_no_text_to_fit(served, tmp_path, capsys):
    path = calibrate.calibrate(
        served, None, engine.CHUNK, tmp_path / "w", weights_only=True, recipe="kakeya-5.3x"
    )
    assert "kakeya-5.3x on" in capsys.readouterr().out
    about, tensors = read(path)
    assert (about["split"], about["text_sha256"]) == ("random tokens", "none")
    assert json.loads(about["held_out"])["recipe"] == "kakeya-5.3x"
    assert set(tensors) > {"k_var", "q_sq", "v_var", "sink_mass"}


def test_another_configuration_than_expected_is_refused(served, tmp_path):
    with pytest.raises(SystemExit, match="another configuration"):
        calibrate.calibrate(served, out=tmp_path / "o", expected_fingerprint="0" * 64)
    with pytest.raises(SystemExit, match="takes no calibration"):
        calibrate.calibrate(served, out=tmp_path / "o", recipe="kakeya-free-4.6x")
    assert list(tmp_path.iterdir()) == []


def test_text_without_a_passage_to_spare_says_so(served, tmp_path, capsys):
    prose = tmp_path / "prose.txt"
    prose.write_text("The sea rises and falls. " * 100)  # 2,500 bytes, one token each
    calibrate.calibrate(served, prose, engine.CHUNK, tmp_path / "o")
    assert "no passage that took no part" in capsys.readouterr().out
