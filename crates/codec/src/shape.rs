//! What the codec must know of a model: its attention shape and its rotary embedding.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Tokens of a block, and so of a page.
pub const BLOCK: usize = 128;

/// Attention shape of a model, as given by the serving engine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    pub num_layers: usize,
    /// KV heads of the whole model, not of a tensor-parallel rank.
    pub num_kv_heads: usize,
    pub num_q_heads: usize,
    pub head_dim: usize,
    /// Longest sequence, tokens.
    pub max_position: usize,
    /// `None`: the model applies no rotary embedding.
    pub rope: Option<Rope>,
}

/// Rotary position embedding: channel pair i turns by `position * inv_freq[i]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Leading channels that rotate; the rest pass through.
    pub rotary_dim: usize,
    /// `false`: pairs are (i, i + rotary_dim/2), GPT-NeoX style. `true`: pairs are (2i, 2i + 1), GPT-J style.
    pub interleaved: bool,
    /// Radians per token, `rotary_dim / 2` of them.
    pub inv_freq: Vec<f64>,
}

/// Bytes of a model's description; 128 frequencies in full take less than 4,000.
const MAX_TEXT: usize = 1 << 16;
/// Channels of all layers and KV heads together.
const MAX_CHANNELS: usize = 1 << 22;

/// Entries of the table of block angles, one a block and pair: those of 16 million tokens at 64 pairs. They take 64 MiB and a
/// second or two.
const MAX_ANGLES: usize = 1 << 23;

/// Head dimensions that the page layout covers.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

impl ModelShape {
    /// Parses and checks the JSON that the serving engine hands over. What is accepted bounds the static tables of a codec:
    /// 32 bytes a channel, 134 MB at most, and 64 MiB for the most angles.
    pub fn from_json(text: &str) -> Result<ModelShape> {
        if text.len() > MAX_TEXT {
            return Err(Error::BadModel(format!("a text of {} bytes; valid: up to {MAX_TEXT}", text.len())));
        }
        let shape: ModelShape = serde_json::from_str(text).map_err(|e| Error::BadModel(e.to_string()))?;
        shape.check()?;
        Ok(shape)
    }

    fn check(&self) -> Result<()> {
        let bad = |m: String| Err(Error::BadModel(m));
        let small = |what: &str, v: usize, max: usize| {
            if (1..=max).contains(&v) {
                Ok(())
            } else {
                Err(Error::BadModel(format!("{what} is {v}; valid: 1..={max}")))
            }
        };
        small("num_layers", self.num_layers, 4096)?;
        small("num_kv_heads", self.num_kv_heads, 1024)?;
        small("num_q_heads", self.num_q_heads, 16384)?;
        // 2^27 tokens: far above any model.
        small("max_position", self.max_position, 1 << 27)?;
        if !HEAD_DIMS.contains(&self.head_dim) {
            return Err(Error::Unsupported(format!("head_dim {}; valid: {HEAD_DIMS:?}", self.head_dim)));
        }
        if !self.num_q_heads.is_multiple_of(self.num_kv_heads) {
            return bad(format!(
                "num_q_heads {} is no multiple of num_kv_heads {}",
                self.num_q_heads, self.num_kv_heads
            ));
        }
        // The largest models have 126 x 8 x 128 channels; bounding the product bounds the memory of the static tables.
        let channels = self.num_layers * self.num_kv_heads * self.head_dim;
        if channels > MAX_CHANNELS {
            return bad(format!(
                "num_layers * num_kv_heads * head_dim is {channels}; valid: up to {MAX_CHANNELS}"
            ));
        }
        if let Some(rope) = &self.rope {
            if rope.rotary_dim == 0 || !rope.rotary_dim.is_multiple_of(2) || rope.rotary_dim > self.head_dim {
                return bad(format!(
                    "rope.rotary_dim is {}; valid: even, 2..={}",
                    rope.rotary_dim, self.head_dim
                ));
            }
            if rope.inv_freq.len() != rope.rotary_dim / 2 {
                return bad(format!(
                    "rope.inv_freq has {} entries, rotary_dim/2 is {}",
                    rope.inv_freq.len(),
                    rope.rotary_dim / 2
                ));
            }
            if let Some(f) = rope.inv_freq.iter().find(|f| !f.is_finite() || **f < 0.0 || **f > 64.0) {
                return bad(format!("rope.inv_freq holds {f}; valid: finite, 0..=64 radians a token"));
            }
            let angles = self.max_blocks() * rope.inv_freq.len();
            if angles > MAX_ANGLES {
                return bad(format!(
                    "max_position / {BLOCK} * rope.rotary_dim / 2 is {angles}; valid: up to {MAX_ANGLES}"
                ));
            }
        }
        Ok(())
    }

    /// Blocks of the longest sequence.
    pub fn max_blocks(&self) -> usize {
        self.max_position.div_ceil(BLOCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a model may ask for in memory is bounded before any of it is taken.
    #[test]
    fn tables_that_no_model_needs_are_refused() {
        let model = |layers: usize, heads: usize, tokens: usize, pairs: usize| {
            let freq = vec!["1"; pairs].join(",");
            ModelShape::from_json(&format!(
                r#"{{"num_layers":{layers},"num_kv_heads":{heads},"num_q_heads":{heads},"head_dim":128,"max_position":{tokens},
                "rope":{{"rotary_dim":{},"interleaved":false,"inv_freq":[{freq}]}}}}"#,
                2 * pairs
            ))
        };
        // Ten million tokens, as the longest model has, and the most angles.
        assert!(model(48, 8, 10 << 20, 64).is_ok());
        assert!(model(48, 8, 1 << 24, 64).is_ok());
        let refused = [
            (model(48, 8, (1 << 24) + 1, 64), "rotary_dim / 2 is 8388672"),
            (model(48, 8, usize::MAX, 64), "max_position"),
            (model(4096, 1024, 4096, 64), "num_layers * num_kv_heads * head_dim"),
        ];
        for (result, part) in refused {
            let e = result.unwrap_err().to_string();
            assert!(e.contains(part), "{e}");
        }
    }
}
