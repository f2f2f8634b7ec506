//! The calibration file: one safetensors artefact of a model's static statistics, from which every recipe derives its
//! tables. Tensors are f32, `[num_layers, num_kv_heads, head_dim]`, channels in the model's own order:
//!
//! | tensor | meaning |
//! |---|---|
//! | `k_mean`, `k_var` | of keys before rotary embedding |
//! | `q_sq`, `q_mean` | E[q^2] and mean of queries before rotary embedding, over the query heads of the group |
//! | `v_mean`, `v_var` | of Hadamard-transformed values |
//! | `sink_mass` (optional), `[.., .., 8]` | attention probability on the 1st..8th best scored token of every block, summed over a sequence's blocks |
//!
//! Metadata: `format` = `kakeya-calibration-1`; everything else is for people and for the serving engine.

use crate::error::{Error, Result};
use crate::page::MAX_ABS;
use crate::shape::ModelShape;
use safetensors::{Dtype, SafeTensors};

/// Value of the metadata key `format`.
pub const FORMAT: &str = "kakeya-calibration-1";
/// What `format` of every version begins with; a number follows.
const FORMATS: &str = "kakeya-calibration-";
/// Score ranks of `sink_mass`.
pub const RANKS: usize = 8;
/// More than any model's artefact (126 layers x 8 heads x 128 channels take 4 MB); bounds what a hostile file costs.
const MAX_BYTES: usize = 1 << 30;

/// Bytes of a file's header: names, shapes and metadata of seven tensors take about one thousand. The parser takes several
/// times as much memory.
const MAX_HEADER: u64 = 1 << 20;
/// Largest magnitude of a mean: of values up to MAX_ABS after a transform of 256 channels. Squares and
/// sums of larger ones would overflow f32, and a block sealed against them would not open as numbers.
const MAX_MEAN: f32 = MAX_ABS * 16.0;
/// Largest mean square: [`MAX_MEAN`] squared.
const MAX_SQUARE: f32 = MAX_MEAN * MAX_MEAN;

/// Statistics of a whole model, checked: shapes fit, all finite, variances not negative, none beyond what pages hold.
#[derive(Debug, Clone)]
pub struct Calibration {
    heads: usize,
    head_dim: usize,
    k_mean: Vec<f32>,
    k_var: Vec<f32>,
    q_sq: Vec<f32>,
    q_mean: Vec<f32>,
    v_mean: Vec<f32>,
    v_var: Vec<f32>,
    sink_mass: Option<Vec<f32>>,
}

/// Statistics of one KV head of one layer, `head_dim` values each.
pub struct HeadStats<'a> {
    pub k_mean: &'a [f32],
    pub k_var: &'a [f32],
    pub q_sq: &'a [f32],
    pub q_mean: &'a [f32],
    pub v_mean: &'a [f32],
    pub v_var: &'a [f32],
}

impl Calibration {
    /// Reads an artefact and checks it against the model. Total: any bytes give statistics or an error, in time and memory
    /// that grow with their number (at most 1 GiB; the header, JSON, at most 1 MiB of it).
    pub fn parse(bytes: &[u8], shape: &ModelShape) -> Result<Calibration> {
        let bad = |m: String| Error::BadCalibration(m);
        if bytes.len() > MAX_BYTES {
            return Err(bad(format!("{} bytes; valid: up to {MAX_BYTES}", bytes.len())));
        }
        if let Some(length) = bytes.first_chunk().map(|b| u64::from_le_bytes(*b)).filter(|n| *n > MAX_HEADER)
        {
            return Err(bad(format!(
                "not a safetensors file of calibration: a header of {length} bytes; valid: up to {MAX_HEADER}"
            )));
        }
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(|e| bad(format!("not a safetensors file: {e}")))?;
        let format =
            header.metadata().as_ref().and_then(|m| m.get("format")).map_or("(none)", |s| s.as_str());
        if format != FORMAT && format.starts_with(FORMATS) {
            return Err(Error::WrongVersion {
                what: "calibration file: metadata 'format'",
                found: format.to_string(),
                expected: FORMAT.to_string(),
            });
        }
        if format != FORMAT {
            return Err(bad(format!("metadata 'format' is '{format}', expected '{FORMAT}'")));
        }
        let file = SafeTensors::deserialize(bytes).map_err(|e| bad(e.to_string()))?;
        let read = |name: &'static str, last: usize| -> Result<Vec<f32>> {
            let t = file.tensor(name).map_err(|_| bad(format!("tensor '{name}' is missing")))?;
            let want = [shape.num_layers, shape.num_kv_heads, last];
            if t.shape() != want {
                return Err(Error::CalibrationMismatch {
                    what: name,
                    found: format!("{:?}", t.shape()),
                    expected: format!("{want:?} (layers, KV heads, channels)"),
                });
            }
            if t.dtype() != Dtype::F32 {
                return Err(bad(format!("tensor '{name}' is {:?}, expected F32", t.dtype())));
            }
            let word = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            let values: Vec<f32> = t.data().chunks_exact(4).map(word).collect();
            match values.iter().position(|v| !v.is_finite()) {
                Some(i) => Err(bad(format!("tensor '{name}' holds {} at element {i}", values[i]))),
                None => Ok(values),
            }
        };
        let within = |name: &'static str, least: f32, most: f32| {
            let v = read(name, shape.head_dim)?;
            let Some(i) = v.iter().position(|x| !(least..=most).contains(x)) else { return Ok(v) };
            let valid = match v[i] < 0.0 && least == 0.0 {
                true => "it must not be negative".to_string(),
                false => format!("valid: {least}..={most}, what rows of a page can have"),
            };
            Err(bad(format!("tensor '{name}' holds {} at element {i}; {valid}", v[i])))
        };
        let mean = |name| within(name, -MAX_MEAN, MAX_MEAN);
        let square = |name| within(name, 0.0, MAX_SQUARE);
        let k_mean = mean("k_mean")?;
        let sink_mass = match file.names().contains(&"sink_mass") {
            true => Some(read("sink_mass", RANKS)?),
            false => None,
        };
        Ok(Calibration {
            heads: shape.num_kv_heads,
            head_dim: shape.head_dim,
            k_mean,
            k_var: square("k_var")?,
            q_sq: square("q_sq")?,
            q_mean: mean("q_mean")?,
            v_mean: mean("v_mean")?,
            v_var: square("v_var")?,
            sink_mass,
        })
    }

    /// Statistics of one KV head.
    pub fn head(&self, layer: usize, head: usize) -> HeadStats<'_> {
        let at = (layer * self.heads + head) * self.head_dim;
        let r = at..at + self.head_dim;
        HeadStats {
            k_mean: &self.k_mean[r.clone()],
            k_var: &self.k_var[r.clone()],
            q_sq: &self.q_sq[r.clone()],
            q_mean: &self.q_mean[r.clone()],
            v_mean: &self.v_mean[r.clone()],
            v_var: &self.v_var[r],
        }
    }

    /// Attention probability that lies on the tokens with these score ranks (0 = best) of all blocks together, mean over
    /// the layer's heads; `None` if not recorded.
    pub fn sink_mass(&self, layer: usize, ranks: std::ops::Range<usize>) -> Option<f32> {
        let mass = self.sink_mass.as_ref()?;
        let of = |h: usize| mass[(layer * self.heads + h) * RANKS..][ranks.clone()].iter().sum::<f32>();
        Some((0..self.heads).map(of).sum::<f32>() / self.heads as f32)
    }
}
