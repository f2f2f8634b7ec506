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

/// Channels of all layers and KV heads together.
const MAX_CHANNELS: usize = 1 << 22;

/// Head dimensions that the page layout covers.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

impl ModelShape {
    /// Parses and checks the JSON that the serving engine hands over.
    pub fn from_json(text: &str) -> Result<ModelShape> {
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
        // 2^27 tokens: far above any model; bounds the table of block angles.
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
        }
        Ok(())
    }

    /// Blocks of the longest sequence.
    pub fn max_blocks(&self) -> usize {
        self.max_position.div_ceil(BLOCK)
    }
}
