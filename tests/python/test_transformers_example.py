"""examples/transformers_cache.py: generation through pages, outside vLLM."""

import importlib.util
from pathlib import Path

import pytest
import torch
from kakeya_vllm import lib
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    "transformers_cache", ROOT / "examples" / "transformers_cache.py"
)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def logits(model, ids, cache, first):
    """Logits of a prompt's tail, read through the cache: ``first`` tokens in one call, the others
    one by one."""
    with torch.no_grad():
        model(ids[:, :first], past_key_values=cache)
        steps = [
            model(ids[:, i : i + 1], past_key_values=cache).logits
            for i in range(first, ids.shape[1])
        ]
    return torch.cat(steps, 1)


def test_pages_are_read_back(model):
    """Near the uncompressed cache's logits, nearer with more bits; small in memory."""
    ids = torch.randint(0, 128, (2, 300), generator=torch.Generator().manual_seed(1))
    exact = DynamicCache()
    want = logits(model, ids, exact, 290)
    errors = []
    for recipe in ("kakeya-free-2.7x", "kakeya-free-4.6x", "kakeya-free-9.0x"):
        cache = example.KakeyaCache(model, recipe)
        got = logits(model, ids, cache, 290)
        errors.append(float((got - want).norm() / want.norm()))
        assert cache.get_seq_length() == 300
        layer = cache.layers[0]
        assert [tuple(page.shape) for page in layer.pages] == [(2, 2, layer.page_bytes)] * 2
        assert layer.keys.shape[-2] == 300 - 256
    assert errors[0] < errors[1] < errors[2] < 0.5
    assert errors[0] < 0.05
    cache = example.KakeyaCache(model, "kakeya-free-4.6x")
    logits(model, ids[:, :257], cache, 256)
    raw = sum(x.nbytes for layer in exact.layers for x in (layer.keys, layer.values)) * 257 / 300
    # float32 here: two blocks in pages at 9.2 times less, one token raw.
    assert cache.nbytes < raw / 8


def test_short_sequences_are_exact(model):
    """Nothing is sealed before a block is full."""
    ids = torch.randint(0, 128, (1, 120), generator=torch.Generator().manual_seed(2))
    want = logits(model, ids, DynamicCache(), 60)
    assert torch.equal(logits(model, ids, example.KakeyaCache(model), 60), want)


def test_generate_and_reset(model):
    ids = torch.randint(3, 128, (1, 130), generator=torch.Generator().manual_seed(3))
    cache = example.KakeyaCache(model)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert out.shape[1] > 130
    assert len(cache.layers[0].pages) == 1
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.layers[0].crop(-1)


def test_a_recipe_that_wants_an_artefact_says_so(model):
    with pytest.raises(lib.KakeyaError, match="needs a calibration"):
        example.KakeyaCache(model, "kakeya-4.6x")
