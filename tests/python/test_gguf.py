"""The GGUF converter: row order, dequantised values, tokenizer, refusals."""

import gguf
import gguf_to_hf
import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 4, 2, 8, 32, 64
VOCAB = ["<|end|>", *"abcdefgh", "Ġ", "ab", "Ġab"]
MERGES = ["a b", "Ġ ab"]


def interleave(rows, heads):
    """What GGUF's Llama converter does to the rows of q and k."""
    shape = rows.shape
    half = shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(shape)


def write_gguf(path, arch="llama", pre="smollm", extra=None):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(INNER)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCAB)
    writer.add_token_types([3] + [1] * (len(VOCAB) - 1))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (len(VOCAB), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
        **(extra or {}),
    }
    # Eighths are exact in bfloat16, so values survive the conversion unchanged.
    tensors = {n: rng.integers(-8, 8, s).astype(np.float32) / 8 for n, s in shapes.items()}
    for name, values in tensors.items():
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        stored = interleave(values, heads) if heads and arch == "llama" else values
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize(("arch", "pre"), [("llama", "smollm"), ("qwen2", "qwen2")])
def test_conversion(tmp_path, arch, pre):
    tensors = write_gguf(tmp_path / "m.gguf", arch, pre)
    gguf_to_hf.main([str(tmp_path / "m.gguf"), str(tmp_path / "hf")])
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(weights) == len(tensors)
    for ours, theirs in {
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down",
        "model.embed_tokens.weight": "token_embd",
    }.items():
        assert np.array_equal(weights[ours].float().numpy(), tensors[theirs]), ours
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.model_type == arch
    assert (config.num_key_value_heads, config.head_dim) == (KV_HEADS, HEAD_DIM)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab ab")["input_ids"]) == ["ab", "Ġab"]
    assert tokenizer("<|end|>c")["input_ids"] == [0, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arch": "mamba"}, "architecture 'mamba' is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"extra": {"blk.0.ssm_in": (4, 4)}}, "'blk.0.ssm_in.weight' has no place"),
    ],
)
def test_unknown_models_are_refused(tmp_path, settings, words):
    write_gguf(tmp_path / "m.gguf", **settings)
    with pytest.raises(SystemExit, match=words):
        gguf_to_hf.main([str(tmp_path / "m.gguf"), str(tmp_path / "hf")])
