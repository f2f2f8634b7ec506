//! What the GPU's attention kernels read of the static tables, in the form in which they compute: operands of their matrix
//! instructions, and constants that make up for fp16's rounding. `kernels/attend.cuh` says how they are used.

use crate::codec::Codec;
use crate::grid::Grid;
use crate::recipe::Quantizer;
use crate::shape::BLOCK;
use crate::unit::LANES;
use half::f16;

/// Factor of the offsets' table, which `kernels/attend_shape.cuh` has too. Uniform codes stand as fp16 subnormals, so do then
/// the mean's products; other scores are 32 times too large, so that queries of small channels keep their bits.
pub fn table_scale(quantizer: Quantizer) -> f32 {
    if quantizer == Quantizer::Uniform { 1.0 / 8192.0 } else { 32.0 }
}

/// Cosines and sines of the offsets above the centre as A operands of `mma.m16n8k16`: u32 `[4][head_dim / 32][32][2][4]`, by
/// pair of mirrored tiles, step of 16 channel pairs, lane, cosines or sines, register. Register r of lane l holds channel
/// pairs 16 step + 8 (r / 2) + 2 (l % 4) and the next, at token 64 + 16 tile + l / 4 + 8 (r % 2). Channels that do not
/// rotate turn by nothing.
pub fn offsets(codec: &Codec) -> Vec<u32> {
    let (rotary, steps) = (&codec.rotary, codec.shape().head_dim / 32);
    let scale = table_scale(codec.recipe().quantizer);
    let mut out = Vec::with_capacity(4 * steps * LANES * 8);
    for tile in 0..4 {
        for step in 0..steps {
            for lane in 0..LANES {
                for (table, still) in [(&rotary.offset_cos, 1.0), (&rotary.offset_sin, 0.0)] {
                    for r in 0..4 {
                        let token = BLOCK / 2 + 16 * tile + lane / 4 + 8 * (r % 2);
                        let half = |k: usize| {
                            let f = 16 * step + 8 * (r / 2) + 2 * (lane % 4) + k;
                            let x = if f < rotary.pairs { table[token * rotary.pairs + f] } else { still };
                            u32::from(f16::from_f32(x * scale).to_bits())
                        };
                        out.push(half(0) | half(1) << 16);
                    }
                }
            }
        }
    }
    out
}

/// By width 0..=6 of cubic alphabets `y (alpha + beta y^2)`: gamma twice as fp16, and f32 factor, for points computed in
/// fp16 as `U (U^2 + gamma)` with U = 4 y. The factor is the one of least squares: the points' own rounding then leaves no
/// bias in a score.
pub fn alphabets(codec: &Codec) -> Vec<u32> {
    codec.grids.iter().enumerate().flat_map(|(width, grid)| alphabet(width, grid)).collect()
}

/// One width's; see [`alphabets`].
pub fn alphabet(width: usize, grid: &Grid) -> [u32; 2] {
    let linear = grid.beta == 0.0;
    if width == 0 || (linear && width > 1) {
        return [0, 1.0f32.to_bits()]; // no codes, or evenly spaced ones, which are used as they are
    }
    // One bit of Lloyd-Max is linear too; at its two points y^2 is 1/4.
    let (alpha, beta) = if linear {
        (f64::from(grid.alpha) - 0.25, 1.0)
    } else {
        (f64::from(grid.alpha), f64::from(grid.beta))
    };
    let gamma = f16::from_f64(16.0 * alpha / beta);
    let (mut with, mut square) = (0.0, 0.0);
    for (m, &point) in grid.points.iter().enumerate() {
        let u = 4.0 * ((m as f64 + 0.5) * 2.0 / grid.points.len() as f64 - 1.0);
        // Exact in f64, rounded once, as the kernel's fused instructions do.
        let v = f16::from_f64(u * u + gamma.to_f64());
        let x = f16::from_f64(u * v.to_f64()).to_f64();
        let point = f64::from(point);
        // How often a Gaussian input meets the point: density times spacing, which grows as the cubic's slope.
        let weight = (-0.5 * point * point).exp() * (alpha + 3.0 / 16.0 * beta * u * u);
        with += weight * x * point;
        square += weight * x * x;
    }
    let bits = u32::from(gamma.to_bits());
    [bits | bits << 16, ((with / square) as f32).to_bits()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::MAX_WIDTH;

    /// Points as the kernel computes them are the alphabet's own within fp16's steps, and without a bias.
    #[test]
    fn points_in_fp16_are_the_alphabet() {
        for quantizer in [Quantizer::Trellis, Quantizer::LloydMax] {
            for width in 1..=MAX_WIDTH {
                let grid = Grid::new(quantizer, width);
                let [gamma, factor] = alphabet(width, &grid);
                let gamma = f16::from_bits(gamma as u16).to_f64();
                let factor = f64::from(f32::from_bits(factor));
                for (m, &point) in grid.points.iter().enumerate() {
                    let u = 4.0 * ((m as f64 + 0.5) * 2.0 / grid.points.len() as f64 - 1.0);
                    let x = f16::from_f64(u * f16::from_f64(u * u + gamma).to_f64()).to_f64() * factor;
                    let error = (x - f64::from(point)).abs();
                    assert!(
                        error <= 2e-3 * f64::from(point).abs(),
                        "{quantizer:?} {width} {m}: {x} for {point}"
                    );
                }
            }
        }
    }
}
