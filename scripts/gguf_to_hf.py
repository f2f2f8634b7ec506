#!/usr/bin/env python3
"""Rewrite a GGUF file as the Hugging Face directory that vLLM and transformers load offline.

Package registries carry small models as GGUF only, while the engine wants safetensors,
config.json and tokenizer.json. The weights are dequantised to float32 and stored as bfloat16
(what the engine computes in), the tokenizer is rebuilt from the vocabulary and merges inside the
GGUF. Covers dense Llama and Qwen2 decoders with a byte-level BPE tokenizer; anything else is
refused by name. The output depends on the input file alone.

    python scripts/gguf_to_hf.py MODEL.gguf OUT_DIR
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# GGUF's name of a tensor inside a block -> its name inside a Hugging Face decoder layer.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Derived by the loader from the configuration.
IGNORED = {"rope_freqs.weight"}

# Token types of GGUF (llama.cpp's enum): which vocabulary entries are matched before BPE runs.
CONTROL, USER_DEFINED = 3, 4

# Qwen2 splits its input with this expression before byte-level BPE.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Gguf:
    """Metadata and dequantised tensors of one file."""

    def __init__(self, path):
        self.reader = GGUFReader(path)
        self.tensors = {t.name: t for t in self.reader.tensors}
        self.arch = self.meta("general.architecture")
        if self.arch not in CLASSES:
            raise SystemExit(
                f"{path}: architecture {self.arch!r} is not supported "
                f"(supported: {', '.join(CLASSES)})"
            )

    def meta(self, key, default=None):
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def param(self, key, default=None):
        return self.meta(f"{self.arch}.{key}", default)

    def tensor(self, name):
        """Float32 array with the outermost dimension first (GGUF lists the innermost first)."""
        t = self.tensors[name]
        shape = tuple(int(n) for n in reversed(t.shape))
        return np.ascontiguousarray(
            dequantize(t.data, t.tensor_type).reshape(shape), dtype=np.float32
        )


def neox_rows(w, heads):
    """Undo the row order of GGUF's Llama converter.

    It interleaves the two halves of each head so that rotary pairs are neighbours; Hugging Face
    keeps the halves apart.
    """
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def convert_weights(g):
    """All tensors under their Hugging Face names, bfloat16."""
    interleaved = {}
    if g.arch == "llama":
        heads = g.param("attention.head_count")
        interleaved = {"attn_q": heads, "attn_k": g.param("attention.head_count_kv", heads)}
    out = {}
    for name in g.tensors:
        if name in IGNORED:
            continue
        w = g.tensor(name)
        if name in TOP_NAMES:
            target = TOP_NAMES[name]
        else:
            block, layer, part, kind = (name.split(".") + [""] * 4)[:4]
            if block != "blk" or part not in LAYER_NAMES:
                raise SystemExit(f"tensor {name!r} has no place in a {CLASSES[g.arch]}")
            if part in interleaved:
                w = neox_rows(w, interleaved[part])
            target = f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
        out[target] = torch.tensor(w).to(torch.bfloat16)
    return out


def model_config(g, weights):
    hidden, heads = g.param("embedding_length"), g.param("attention.head_count")
    theta = float(g.param("rope.freq_base", 10000.0))
    config = {
        "architectures": [CLASSES[g.arch]],
        "model_type": g.arch,
        "hidden_size": hidden,
        "intermediate_size": g.param("feed_forward_length"),
        "num_hidden_layers": g.param("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": g.param("attention.head_count_kv", heads),
        "head_dim": g.param("attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": g.param("context_length"),
        # GGUF stores float32; three digits recover the decimal that the model's authors wrote
        # (1e-05, 1e-06).
        "rms_norm_eps": float(f"{g.param('attention.layer_norm_rms_epsilon'):.3g}"),
        # Both spellings: transformers 5 reads rope_parameters, older ones rope_theta.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": "blk.0.attn_q.bias" in g.tensors,
        "mlp_bias": False,
        "bos_token_id": g.meta("tokenizer.ggml.bos_token_id"),
        "eos_token_id": g.meta("tokenizer.ggml.eos_token_id"),
        "pad_token_id": g.meta("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }
    if g.arch == "qwen2":
        config["use_sliding_window"] = False
    return config


def build_tokenizer(g):
    if g.meta("tokenizer.ggml.model") != "gpt2":
        raise SystemExit(f"tokenizer {g.meta('tokenizer.ggml.model')!r} is not byte-level BPE")
    vocab, types = g.meta("tokenizer.ggml.tokens"), g.meta("tokenizer.ggml.token_type")
    # A merge is "left right"; a piece may itself begin with a space, so the split is at the first
    # space after one character.
    merges = []
    for m in g.meta("tokenizer.ggml.merges"):
        cut = m.index(" ", 1)
        merges.append((m[:cut], m[cut + 1 :]))
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=merges))
    style = g.meta("tokenizer.ggml.pre")
    if style == "smollm":
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif style == "qwen2":
        tok.normalizer = normalizers.NFC()
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        raise SystemExit(f"pre-tokenizer {style!r} is not supported (supported: smollm, qwen2)")
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(t, special=special, normalized=False)
            for t, k in zip(vocab, types, strict=True)
            if k == kind
        ]
        (tok.add_special_tokens if special else tok.add_tokens)(added)
    if tok.get_vocab_size() != len(vocab):
        raise SystemExit(
            f"rebuilt tokenizer has {tok.get_vocab_size()} entries, the file lists {len(vocab)}"
        )
    return tok


def tokenizer_config(g):
    vocab = g.meta("tokenizer.ggml.tokens")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": g.param("context_length"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = g.meta(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{role}_token"] = vocab[index]
    template = g.meta("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return config


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(source, target):
    """Write the directory `target` (made if missing) from the GGUF file `source`."""
    g, target = Gguf(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    weights = convert_weights(g)
    config = model_config(g, weights)
    build_tokenizer(g).save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", tokenizer_config(g))
    write_json(target / "config.json", config)
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(target / "generation_config.json", ids)
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
    count = sum(w.numel() for w in weights.values())
    print(
        f"{target}: {config['architectures'][0]}, {config['num_hidden_layers']} layers, "
        f"{config['num_attention_heads']} query / {config['num_key_value_heads']} KV heads, "
        f"head_dim {config['head_dim']}, {count / 1e6:.1f} M parameters"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", help="file to read")
    parser.add_argument("out", help="directory to write")
    args = parser.parse_args(argv)
    convert(args.gguf, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
