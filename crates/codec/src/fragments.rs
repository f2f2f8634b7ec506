//! What the GPU's attention kernels read of the static tables, in the form in which they compute: operands of their matrix
//! instructions, and constants that make up for fp16's rounding. `kernels/attend.cuh` says how they are used.

use crate::codec::{Codec, StreamTables};
use crate::device::inverse;
use crate::grid::Grid;
use crate::recipe::Quantizer;
use crate::shape::BLOCK;
use crate::stats::pair_channels;
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

/// Of a cubic alphabet `y (alpha + beta y^2)`: gamma twice as fp16, and f32 factor, for points computed in fp16 as
/// `U (U^2 + gamma)` with U = 4 y. The factor is the one of least squares: the points' own rounding then leaves no bias in a
/// score.
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

/// Bit at which a unit's codes of class c stand as uniform codes are read; `code_bit` of `kernels/dequant.cuh`. With units
/// of 16 channels classes c and c + 2 are the same channels.
pub fn code_bit(width: usize, class: usize, narrow: bool) -> i32 {
    let c = if narrow { class % 2 } else { class };
    (match width {
        1 => c,
        2 => 2 * c,
        3 => [0, 3, 6, 0][c],
        4 => 4 * (c % 2),
        5 if c == 1 => 5,
        _ => 0,
    }) as i32
}

/// A unit's offset from its group's start, width, that of the chain's unit before, and what [`alphabet`] says; of uniform
/// codes -(2^width - 1) / 2 twice as fp16 instead of gamma.
/// `kakeya::AttendUnit` in `kernels/tables.cuh`, as the next three are its namesakes there.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AttendUnit {
    offset: u32,
    widths: [u8; 4],
    gamma: u32,
    undo: f32,
}

/// What a warp needs: its units of keys and values, and by class of channels what brings a slot's deviations, sixteenths
/// as 1024 + 128 + value in fp16, to its codes. Keys: factors and addends that take off 1152, twice as fp16; values: the sum's
/// factor.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AttendWarp {
    k: AttendUnit,
    v: AttendUnit,
    up: [u32; 4],
    add: [u32; 4],
    undo: [f32; 4],
}

/// What threads need of a pair of channels: the largest query, what a block turns it by, natural channels, code positions,
/// then mean, step, scale and zero point of two channels of keys and of channels 2 f and 2 f + 1 of values.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AttendPair {
    limit: f32,
    turn_cos: f32,
    turn_sin: f32,
    natural: [u16; 2],
    k_position: [u16; 2],
    v_position: [u16; 2],
    unused: [u32; 2],
    stats: [[f32; 4]; 4],
}

#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AttendHead {
    warps: [AttendWarp; 8],
    k_stride: u32,
    v_stride: u32,
    side_offset: u32,
    slots_offset: u32,
    num_slots: u32,
    unused: [u32; 3],
    v_order: [u8; 256],
}

/// fp16 range with a margin, as in `kernels/attend_shape.cuh`.
const HALF_MAX: f32 = 60000.0;

fn power2(e: i32) -> f32 {
    f32::from_bits(((127 + e) as u32) << 23)
}

fn twice(x: f32) -> u32 {
    u32::from(f16::from_f32(x).to_bits()) * 0x0001_0001
}

/// Records `[num_layers][num_kv_heads]`: an [`AttendHead`] and `[head_dim / 2]` of [`AttendPair`].
pub fn heads(codec: &Codec) -> Vec<u8> {
    let (shape, rotary) = (codec.shape(), &codec.rotary);
    let (d, uniform) = (shape.head_dim, codec.recipe().quantizer == Quantizer::Uniform);
    let calibrated = codec.stats.calibrated;
    let largest_factor = if calibrated { *codec.stats.factors.last().expect("factors") } else { 0.0 };
    let table_scale = table_scale(codec.recipe().quantizer);
    // How much too small or too large scores come out: `Attend::kScoreUnit`.
    let score_unit = if uniform { power2(20) } else { 1.0 / 32.0 };
    let mean_scale = 1.0 / (score_unit * table_scale);
    let alphabets: Vec<[u32; 2]> =
        codec.grids.iter().enumerate().map(|(w, grid)| alphabet(w, grid)).collect();
    // By a block: the same for all heads. Channels that do not rotate turn by nothing.
    let turns: Vec<[f32; 2]> = if shape.max_blocks() > 1 {
        let ((c0, s0), (c1, s1)) = (rotary.centre(0), rotary.centre(1));
        (0..rotary.pairs).map(|f| [c1[f] * c0[f] + s1[f] * s0[f], s1[f] * c0[f] - c1[f] * s0[f]]).collect()
    } else {
        Vec::new()
    };
    let mut out = Vec::new();
    for layer in 0..shape.num_layers {
        let layout = codec.page_layout(layer).expect("layer in range");
        let (channels, narrow) = (layout.unit.channels, layout.unit.channels == 16);
        for head in 0..shape.num_kv_heads {
            let t = codec.tables(layer, head).expect("head in range");
            let alpha = |w: usize| codec.grids[w].alpha;
            let unit = |s: &StreamTables, u: usize| {
                let mut x = <AttendUnit as bytemuck::Zeroable>::zeroed();
                x.undo = 1.0;
                let Some(&w) = s.widths.get(u) else { return x };
                // Units' widths never rise along a chain, so the unit before one with codes has some too.
                let before = if u > 0 && w > 0 { s.widths[u - 1] } else { 0 };
                x.offset = s.widths[..u].iter().map(|&w| 64 * u32::from(w)).sum();
                x.widths = [w, before, 0, 0];
                if uniform {
                    x.gamma = twice(-0.5 * ((1 << w) - 1) as f32);
                    if w > 0 {
                        x.undo = power2(i32::from(w) - 1) / alpha(w.into());
                    }
                } else {
                    let [gamma, factor] = alphabets[usize::from(w)];
                    x.gamma = gamma;
                    x.undo = 1.0 / f32::from_bits(factor);
                }
                x
            };
            let stride = |s: &StreamTables| s.widths.iter().map(|&w| 64 * u32::from(w)).sum();
            let mut record = <AttendHead as bytemuck::Zeroable>::zeroed();
            let units = d / channels;
            for (u, warp) in record.warps.iter_mut().enumerate() {
                warp.k = unit(&t.k, u);
                // A wide unit of keys goes with a narrow one of values. A warp without units has neither.
                warp.v = unit(&t.v, if u < units { units - 1 - u } else { u });
                let (k_width, v_width) = (usize::from(warp.k.widths[0]), usize::from(warp.v.widths[0]));
                for class in 0..4 {
                    let k_bit = if uniform { code_bit(k_width, class, narrow) } else { 0 };
                    let up = power2(k_bit - 4);
                    warp.up[class] = twice(up);
                    warp.add[class] = twice(-1152.0 * up);
                    let v_bit =
                        if uniform && v_width > 0 { code_bit(v_width, class, narrow) - 24 } else { 0 };
                    warp.undo[class] = warp.v.undo * power2(v_bit);
                }
                // Queries of uniform codes carry 2^(4 - bit), and the codes 2^(bit - 24).
                warp.k.undo *= if uniform { 16.0 * power2(-24) } else { 16.0 };
            }
            record.k_stride = stride(&t.k);
            record.v_stride = stride(&t.v);
            record.side_offset = layout.side_offset as u32;
            record.slots_offset = layout.slots_offset as u32;
            record.num_slots = layout.num_slots as u32;
            for (to, &from) in record.v_order.iter_mut().zip(&t.v.order) {
                *to = from as u8; // head_dim is at most 256
            }
            out.extend_from_slice(bytemuck::bytes_of(&record));
            let (k_position, v_position) = (inverse(&t.k.order), inverse(&t.v.order));
            for f in 0..d / 2 {
                let k = pair_channels(f, rotary.pairs);
                let v = [2 * f, 2 * f + 1];
                let mut pair = <AttendPair as bytemuck::Zeroable>::zeroed();
                pair.natural = k.map(|c| rotary.natural.as_ref().map_or(c, |n| n[c]) as u16);
                pair.k_position = k.map(|c| k_position[c]);
                pair.v_position = v.map(|c| v_position[c]);
                [pair.turn_cos, pair.turn_sin] = turns.get(f).copied().unwrap_or([1.0, 0.0]);
                let (mut largest_scale, mut largest_mean) = (0f32, 0f32);
                for (i, x) in pair.stats.iter_mut().enumerate() {
                    let is_k = i < 2;
                    let (s, c) = if is_k { (&t.k, k[i]) } else { (&t.v, v[i - 2]) };
                    let position =
                        usize::from(if is_k { pair.k_position[i] } else { pair.v_position[i - 2] });
                    let w = usize::from(s.widths[position / channels]);
                    let (mut mean, step, mut scale, mut zero) = (s.mean[c], s.step[c], s.sigma[c], 0.0);
                    if uniform {
                        let bit = code_bit(w, position % channels / 8, narrow);
                        let of_code = if w > 0 { alpha(w) * power2(1 - w as i32) } else { 1.0 };
                        // Keys: their score misses 2^20. Values: the sum's scale makes up for the subnormal.
                        if is_k {
                            scale *= of_code * power2(4 - if w > 0 { bit } else { 0 });
                        } else if w > 0 {
                            scale *= of_code * power2(24 - bit);
                            zero = -0.5 * ((1 << w) - 1) as f32 * power2(bit - 24);
                        }
                    } else {
                        scale *= f32::from_bits(alphabets[w][1]);
                        if is_k {
                            scale *= table_scale;
                        }
                    }
                    if calibrated {
                        if is_k {
                            largest_scale = largest_scale.max(largest_factor * scale.abs());
                            largest_mean = largest_mean.max(mean.abs() + 32.0 * step.abs());
                        }
                        mean -= 32.0 * step; // codes of means are 32 too large
                    }
                    *x = [mean, step, scale, zero];
                }
                // What a page's statistics can make of a query stays finite in fp16 below it: one above would need scores
                // of thousands. A block's own statistics have no bound to speak of.
                pair.limit = HALF_MAX / largest_scale.max(2.0 * mean_scale * largest_mean);
                out.extend_from_slice(bytemuck::bytes_of(&pair));
            }
        }
    }
    out
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
