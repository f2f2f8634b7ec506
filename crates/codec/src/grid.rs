//! Quantiser alphabets. All three rungs share one formula, so that a kernel needs no table to read them:
//!
//! ```text
//! y = (m + 1/2) / 2^(s-1) - 1        m: symbol of s bits, y in (-1, 1)
//! x = y * (alpha + beta * y^2)       for a unit-variance source
//! ```
//!
//! * uniform: s = width, beta = 0, alpha the step that minimises the MSE of a Gaussian;
//! * Lloyd-Max: s = width, a cubic compander fitted to the Gaussian optimum (MSE within 0.5 % of Lloyd-Max at 2 and
//!   3 bits, 2 % at 4);
//! * trellis: s = width + 1, of which a path through an 8-state trellis spells the two low bits
//!   (see [`crate::trellis`]); the cubic is within 2 % of the trained alphabet up to 3 bits, 4 % at 4.

use crate::recipe::Quantizer;

/// Widest code of a channel, bits.
pub const MAX_WIDTH: usize = 6;

/// (alpha, beta) by width 1..=6: numerical minimum of the Gaussian MSE.
const UNIFORM: [(f32, f32); 6] =
    [(1.5958, 0.0), (1.9914, 0.0), (2.3441, 0.0), (2.6816, 0.0), (3.0102, 0.0), (3.3300, 0.0)];
const LLOYD_MAX: [(f32, f32); 6] =
    [(1.5958, 0.0), (1.7859, 0.4053), (1.8858, 0.7414), (1.9241, 1.0739), (1.9492, 1.3796), (1.9748, 1.6665)];
/// Fitted to alphabets trained by Lloyd iterations around the Viterbi search on Gaussian noise.
const TRELLIS: [(f32, f32); 6] =
    [(1.381, 0.381), (1.421, 0.916), (1.413, 1.317), (1.411, 1.660), (1.409, 1.977), (1.407, 2.270)];

/// Gaussian MSE by width 0..=6, what the width allocation minimises.
const MSE_UNIFORM: [f64; 7] = [1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.00104];
const MSE_LLOYD_MAX: [f64; 7] = [1.0, 0.3634, 0.1175, 0.03462, 0.009688, 0.002649, 0.000716];
const MSE_TRELLIS: [f64; 7] = [1.0, 0.310, 0.0878, 0.0244, 0.0067, 0.00183, 0.00054];

/// The alphabet of one width of one quantiser.
#[derive(Debug, Clone)]
pub struct Grid {
    /// Bits of a symbol: the width, plus one for the trellis.
    pub symbol_bits: u32,
    pub alpha: f32,
    pub beta: f32,
    /// Reconstruction points by symbol, ascending, unit variance.
    pub points: Vec<f32>,
    /// Decision thresholds. Scalar: `points.len() - 1` midpoints. Trellis: for each of the four subsets (symbol mod 4)
    /// the midpoints of its own points, `points.len() / 4 - 1` each, subset-major.
    pub thresholds: Vec<f32>,
}

/// `y * (alpha + beta * y * y)` of symbol `m`, in exactly this order of roundings: tables, SIMD and device code agree
/// on every bit because all of them evaluate this expression in f32 without contraction.
#[inline(always)]
pub fn point(symbol_bits: u32, alpha: f32, beta: f32, m: u32) -> f32 {
    let y = (m as f32 + 0.5) * (2.0 / (1u32 << symbol_bits) as f32) - 1.0;
    y * (alpha + beta * (y * y))
}

/// Step of the even grid of `width` bits (1..=6), in deviations, by which sealing compares the scales of a channel, whatever
/// quantiser codes it afterwards.
#[inline(always)]
pub fn even_step(width: usize) -> f32 {
    UNIFORM[width - 1].0 * (2.0 / (1u32 << width) as f32)
}

/// What an even grid of 2^`width` points leaves of `u`: both in steps, `u` counted from the point above the middle, hence
/// points at -2^(width-1) .. 2^(width-1) - 1. The sum with 3 * 2^22 rounds to an integer, ties to even: all
/// implementations do it by this sum, which costs less than a rounding instruction.
#[inline(always)]
pub fn even_error(u: f32, width: usize) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    let half = (1u32 << (width - 1)) as f32;
    let inside = u.max(-half).min(half - 1.0);
    u - ((inside + MAGIC) - MAGIC)
}

impl Grid {
    /// The alphabet for codes of `width` bits, 1..=6.
    pub fn new(quantizer: Quantizer, width: usize) -> Grid {
        assert!((1..=MAX_WIDTH).contains(&width), "width {width} outside 1..=6");
        let (alpha, beta) = match quantizer {
            Quantizer::Uniform => UNIFORM[width - 1],
            Quantizer::LloydMax => LLOYD_MAX[width - 1],
            Quantizer::Trellis => TRELLIS[width - 1],
        };
        let symbol_bits = width as u32 + u32::from(quantizer == Quantizer::Trellis);
        let points: Vec<f32> = (0..1u32 << symbol_bits).map(|m| point(symbol_bits, alpha, beta, m)).collect();
        let stride = if quantizer == Quantizer::Trellis { 4 } else { 1 };
        let mut thresholds = Vec::new();
        for subset in 0..stride {
            let own: Vec<f32> = points.iter().copied().skip(subset).step_by(stride).collect();
            thresholds.extend(own.windows(2).map(|p| 0.5 * (p[0] + p[1])));
        }
        Grid { symbol_bits, alpha, beta, points, thresholds }
    }

    /// Index of the nearest scalar level: the number of thresholds below `z`. A tie goes to the lower level.
    #[inline(always)]
    pub fn nearest(&self, z: f32) -> u32 {
        self.thresholds.iter().map(|&t| u32::from(z > t)).sum()
    }
}

/// Gaussian mean squared error of one channel of unit variance by width 0..=6.
pub fn distortion(quantizer: Quantizer) -> &'static [f64; 7] {
    match quantizer {
        Quantizer::Uniform => &MSE_UNIFORM,
        Quantizer::LloydMax => &MSE_LLOYD_MAX,
        Quantizer::Trellis => &MSE_TRELLIS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_ascend_and_are_odd() {
        for q in [Quantizer::Uniform, Quantizer::LloydMax, Quantizer::Trellis] {
            for w in 1..=MAX_WIDTH {
                let g = Grid::new(q, w);
                let n = g.points.len();
                assert!(g.points.windows(2).all(|p| p[0] < p[1]), "{q:?} {w}");
                for i in 0..n {
                    assert_eq!(g.points[i], -g.points[n - 1 - i], "{q:?} {w} {i}");
                }
            }
        }
    }

    #[test]
    fn even_error_is_the_distance_to_the_uniform_grid() {
        for w in 1..=MAX_WIDTH {
            let g = Grid::new(Quantizer::Uniform, w);
            for i in -4000..4000 {
                let z = i as f32 / 777.0;
                let left = even_error(z / even_step(w) - 0.5, w) * even_step(w);
                let own = z - g.points[g.nearest(z) as usize];
                assert!((left.abs() - own.abs()).abs() < 1e-5, "{w} {z}: {left} {own}");
            }
        }
    }

    #[test]
    fn scalar_mse_is_what_the_allocation_assumes() {
        // Midpoint rule on [-8, 8] against the Gaussian density.
        for q in [Quantizer::Uniform, Quantizer::LloydMax] {
            for (w, &want) in distortion(q).iter().enumerate().skip(1) {
                let g = Grid::new(q, w);
                let (n, mut mse, mut mass) = (160_001, 0.0, 0.0);
                for i in 0..n {
                    let x = -8.0 + 16.0 * i as f64 / (n - 1) as f64;
                    let p = (-0.5 * x * x).exp();
                    let e = x - f64::from(g.points[g.nearest(x as f32) as usize]);
                    mse += p * e * e;
                    mass += p;
                }
                let got = mse / mass;
                assert!((got / want - 1.0).abs() < 0.01, "{q:?} {w}: {got} vs {want}");
            }
        }
    }
}
