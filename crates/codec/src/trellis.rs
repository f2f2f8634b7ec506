//! Trellis-coded quantisation: an 8-state, rate-1/2 feed-forward code (Ungerboeck's, octal 13/04) chooses for every
//! element one of four interleaved subsets of a doubled alphabet, so that `width` bits select among 2^(width+1) points.
//!
//! With u_n the path bit of element n (u before the chain's start is 0):
//!
//! ```text
//! z1 = u_n ^ u_(n-1) ^ u_(n-3)      z0 = u_(n-2)
//! symbol = 4 * refinement + 2 * z1 + z0
//! ```
//!
//! A chain is the codes of one lane over all units of a stream, in the order of the units and of `n` inside them: a
//! decoder lane needs three bits of its own past and nothing from its neighbours. Chains of 64 steps lose 0.6 % of MSE
//! against endless ones. State: u_(n-1) + 2 u_(n-2) + 4 u_(n-3).

use crate::grid::Grid;

/// States of the trellis.
pub const STATES: usize = 8;

/// Subset (two low bits of the symbol) that path bit `u` selects in `state`.
#[inline(always)]
pub const fn subset(state: usize, u: usize) -> usize {
    2 * ((u ^ state ^ (state >> 2)) & 1) + ((state >> 1) & 1)
}

/// State after path bit `u`.
#[inline(always)]
pub const fn next(state: usize, u: usize) -> usize {
    ((state << 1) | u) & (STATES - 1)
}

/// Index within subset `j` of the point nearest to `z`; a tie goes to the lower point.
#[inline(always)]
fn nearest_in_subset(grid: &Grid, j: usize, z: f32) -> u32 {
    let n = grid.thresholds.len() / 4;
    grid.thresholds[j * n..(j + 1) * n].iter().map(|&t| u32::from(z > t)).sum()
}

/// Viterbi search over one chain. `steps` yields (z, alphabet) in chain order; returns (path bit, refinement) of each.
///
/// Ties: of two predecessors the lower state wins, of the final states the lowest.
pub fn encode(steps: &[(f32, &Grid)]) -> Vec<(u8, u8)> {
    let mut cost = [f32::INFINITY; STATES];
    cost[0] = 0.0;
    let mut from_high: Vec<[bool; STATES]> = Vec::with_capacity(steps.len());
    let mut nearest: Vec<[u8; 4]> = Vec::with_capacity(steps.len());
    for &(z, grid) in steps {
        let mut d = [0.0; 4];
        let mut index = [0; 4];
        for j in 0..4 {
            let q = nearest_in_subset(grid, j, z);
            let e = z - grid.points[(4 * q) as usize + j];
            index[j] = q as u8;
            d[j] = e * e;
        }
        let mut new = [0.0; STATES];
        let mut high = [false; STATES];
        for (s, (new, high)) in new.iter_mut().zip(&mut high).enumerate() {
            let (u, low) = (s & 1, s >> 1);
            let a = cost[low] + d[subset(low, u)];
            let b = cost[low | 4] + d[subset(low | 4, u)];
            *high = b < a;
            *new = if b < a { b } else { a };
        }
        cost = new;
        from_high.push(high);
        nearest.push(index);
    }
    let mut state = 0;
    for s in 1..STATES {
        if cost[s] < cost[state] {
            state = s;
        }
    }
    let mut codes = vec![(0, 0); steps.len()];
    for n in (0..steps.len()).rev() {
        let u = state & 1;
        let before = (state >> 1) | if from_high[n][state] { 4 } else { 0 };
        codes[n] = (u as u8, nearest[n][subset(before, u)]);
        state = before;
    }
    codes
}

/// Symbol of each step of a chain from its (path bit, refinement).
pub fn symbols(codes: impl IntoIterator<Item = (u8, u8)>) -> impl Iterator<Item = u32> {
    let mut state = 0;
    codes.into_iter().map(move |(u, refinement)| {
        let symbol = 4 * u32::from(refinement) + subset(state, usize::from(u)) as u32;
        state = next(state, usize::from(u));
        symbol
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::distortion;
    use crate::recipe::Quantizer;

    fn gaussian(n: usize) -> Vec<f32> {
        // Box-Muller over a linear congruential generator: a test needs no better.
        let mut s = 0x9e37_79b9_7f4a_7c15_u64;
        let mut uniform = || {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((s >> 11) as f64 + 0.5) / (1u64 << 53) as f64
        };
        (0..n)
            .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
            .collect()
    }

    #[test]
    fn mse_is_what_the_allocation_assumes() {
        for width in 1..=6 {
            let grid = Grid::new(Quantizer::Trellis, width);
            let mut sum = 0.0;
            let x = gaussian(64 * 400);
            for chain in x.chunks(64) {
                let steps: Vec<(f32, &Grid)> = chain.iter().map(|&z| (z, &grid)).collect();
                for (m, z) in symbols(encode(&steps)).zip(chain) {
                    sum += f64::from(z - grid.points[m as usize]).powi(2);
                }
            }
            let (got, want) = (sum / x.len() as f64, distortion(Quantizer::Trellis)[width]);
            assert!((got / want - 1.0).abs() < 0.06, "width {width}: {got} against {want}");
        }
    }

    /// On short chains the search equals brute force over all paths.
    #[test]
    fn viterbi_is_optimal() {
        let grids = [Grid::new(Quantizer::Trellis, 1), Grid::new(Quantizer::Trellis, 3)];
        for chain in gaussian(10 * 40).chunks(10) {
            let steps: Vec<(f32, &Grid)> =
                chain.iter().enumerate().map(|(i, &z)| (z, &grids[i % 2])).collect();
            let cost = |codes: &[(u8, u8)]| -> f64 {
                symbols(codes.iter().copied())
                    .zip(&steps)
                    .map(|(m, (z, g))| f64::from(z - g.points[m as usize]).powi(2))
                    .sum()
            };
            let found = cost(&encode(&steps));
            for path in 0..1024usize {
                let mut state = 0;
                let codes: Vec<(u8, u8)> = steps
                    .iter()
                    .enumerate()
                    .map(|(n, (z, g))| {
                        let u = path >> n & 1;
                        let q = nearest_in_subset(g, subset(state, u), *z);
                        state = next(state, u);
                        (u as u8, q as u8)
                    })
                    .collect();
                assert!(found <= cost(&codes) + 1e-6);
            }
        }
    }
}
