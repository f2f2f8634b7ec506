//! Rotary embedding as the codec uses it. Keys arrive rotated by their position p. A page keeps them in the frame of
//! its block's centre, t = 128 n + 63.5: turned back by t, so that a query turned back by t once a block meets them
//! without any rotation of codes. What remains is each token's turn by its offset from the centre, j - 63.5:
//! as far to one side of the centre as to the other, so that cosines and sines of 64 distances serve both halves.
//!
//! Angles are computed in f64 and rounded to f32 (`libm`, so that every platform gets the same table). The offsets' table
//! is rounded on to multiples of 1 / 2048: fp16 operands of matrix instructions then hold it exactly, also scaled down to
//! where codes stand as subnormals, and the mean that a reader turns is the very one that sealing took off. Channels are handled in canonical order: first members of all pairs, second
//! members, channels that do not rotate.

use crate::shape::{BLOCK, ModelShape};

/// Distance of a block's centre from its first token: it lies midway between tokens 63 and 64.
pub const CENTRE: f64 = (BLOCK - 1) as f64 / 2.0;
/// Steps of the offsets' table in 1: fp16 has 11 bits, and 1 / 2048 x 2^-13 is its smallest number, 2^-24.
const GRID: f32 = 2048.0;

/// Rotation tables of a model.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// Pairs that rotate: canonical channel i pairs with i + pairs.
    pub pairs: usize,
    /// Natural channel of each canonical one; `None` when they are the same.
    pub natural: Option<Vec<usize>>,
    /// cos and sin of the turn to the centre of block n: `[n * pairs + i]`.
    centre_cos: Vec<f32>,
    centre_sin: Vec<f32>,
    /// cos and sin of token j's offset from the centre, multiples of 1 / 2048: `[j * pairs + i]`.
    pub offset_cos: Vec<f32>,
    pub offset_sin: Vec<f32>,
}

impl Rotary {
    pub fn new(shape: &ModelShape) -> Rotary {
        let (freq, interleaved): (&[f64], bool) = match &shape.rope {
            Some(r) => (&r.inv_freq, r.interleaved),
            None => (&[], false),
        };
        let pairs = freq.len();
        let natural = interleaved.then(|| {
            let first = (0..pairs).map(|i| 2 * i);
            let second = (0..pairs).map(|i| 2 * i + 1);
            first.chain(second).chain(2 * pairs..shape.head_dim).collect()
        });
        let table = |n: usize, angle: &dyn Fn(usize) -> f64| {
            let mut cos = Vec::with_capacity(n * pairs);
            let mut sin = Vec::with_capacity(n * pairs);
            for t in 0..n {
                for f in freq {
                    cos.push(libm::cos(angle(t) * f) as f32);
                    sin.push(libm::sin(angle(t) * f) as f32);
                }
            }
            (cos, sin)
        };
        let (centre_cos, centre_sin) = table(shape.max_blocks(), &|n| (n * BLOCK) as f64 + CENTRE);
        let (mut offset_cos, mut offset_sin) = table(BLOCK, &|j| j as f64 - CENTRE);
        offset_cos.iter_mut().chain(&mut offset_sin).for_each(|x| *x = (*x * GRID).round_ties_even() / GRID);
        Rotary { pairs, natural, centre_cos, centre_sin, offset_cos, offset_sin }
    }

    /// cos and sin rows of block `n`'s centre.
    #[inline(always)]
    pub fn centre(&self, n: usize) -> (&[f32], &[f32]) {
        let r = n * self.pairs..(n + 1) * self.pairs;
        (&self.centre_cos[r.clone()], &self.centre_sin[r])
    }

    /// cos and sin rows of token `j`'s offset from its block's centre.
    #[inline(always)]
    pub fn offset(&self, j: usize) -> (&[f32], &[f32]) {
        let r = j * self.pairs..(j + 1) * self.pairs;
        (&self.offset_cos[r.clone()], &self.offset_sin[r])
    }

    /// Natural channel order to canonical.
    #[inline(always)]
    pub fn to_canonical(&self, row: &mut [f32]) {
        if let Some(natural) = &self.natural {
            let copy = row.to_vec();
            for (c, &n) in natural.iter().enumerate() {
                row[c] = copy[n];
            }
        }
    }

    /// Canonical channel order to natural.
    #[inline(always)]
    pub fn to_natural(&self, row: &mut [f32]) {
        if let Some(natural) = &self.natural {
            let copy = row.to_vec();
            for (c, &n) in natural.iter().enumerate() {
                row[n] = copy[c];
            }
        }
    }
}

/// Turns the pairs of a canonical row forward by the given angles.
#[inline(always)]
pub fn turn(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, rest) = row.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(rest).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// Turns the pairs of a canonical row back by the given angles.
#[inline(always)]
pub fn turn_back(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, rest) = row.split_at_mut(cos.len());
    for (((a, b), c), s) in a.iter_mut().zip(rest).zip(cos).zip(sin) {
        (*a, *b) = (*a * c + *b * s, *b * c - *a * s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Rope;
    use half::f16;

    #[test]
    fn offsets_mirror_and_fp16_holds_them_also_scaled_to_subnormal_codes() {
        let inv_freq: Vec<f64> = (0..64).map(|i| 1e6f64.powf(-f64::from(i) / 64.0)).collect();
        let rope = Rope { rotary_dim: 128, interleaved: false, inv_freq };
        let shape = ModelShape {
            num_layers: 1,
            num_kv_heads: 1,
            num_q_heads: 1,
            head_dim: 128,
            max_position: 4096,
            rope: Some(rope),
        };
        let rotary = Rotary::new(&shape);
        for &x in rotary.offset_cos.iter().chain(&rotary.offset_sin) {
            assert_eq!(f16::from_f32(x).to_f32(), x);
            assert_eq!(f16::from_f32(x / 8192.0).to_f32() * 8192.0, x);
        }
        // Tokens at equal distances on either side of the centre share the cosine and differ in the sine's sign.
        for j in 0..BLOCK / 2 {
            let ((cos, sin), (other_cos, other_sin)) = (rotary.offset(j), rotary.offset(BLOCK - 1 - j));
            assert_eq!(cos, other_cos);
            assert!(sin.iter().zip(other_sin).all(|(a, b)| *a == -*b));
        }
    }
}
