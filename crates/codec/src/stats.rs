//! Block statistics of a page: each channel's mean and deviation over the block's tokens (exact ones left out), coded
//! against the calibrated ones, or freely where there is no calibration.
//!
//! Calibrated: the mean in 6 bits of an eighth of the channel's deviation (clipped at 4 deviations), the deviation as
//! one of 16 factors. Free: the mean as f16, the deviation in eighths of an octave from 2^-16 on.

use crate::shape::BLOCK;
use half::f16;

/// log2 of the factor that scale code c stands for. Quarter octaves where blocks are (deviation within 0.6 and 2.8 of the
/// calibrated one), coarser outside, so that text unlike the calibration's still fits: up to 32 deviations.
const FACTOR_LOG2: [f64; 16] =
    [-2.0, -1.25, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.75, 3.75, 5.0];

/// Attempts at a channel's scale; see [`StatsCoder::candidate`]. On keys and values of real models four leave 6 % less
/// squared error at 3 bits, 16 % at 4 and 28 % at 5 than the deviation's scale does: 128 tokens are few, and what an even
/// grid wants is their extent.
pub const SCALE_ATTEMPTS: usize = 4;

/// How statistics are coded, with its tables.
#[derive(Debug, Clone)]
pub struct StatsCoder {
    pub calibrated: bool,
    /// Deviation (free) or factor (calibrated) by code.
    pub factors: Vec<f32>,
    /// Squared geometric midpoints between neighbouring factors: a mean square above threshold c has a code above c.
    thresholds: Vec<f32>,
    /// By place in a page: two of K's channels and two of V's, pair by pair. K's of pair f are those that turn together, or
    /// where none do 2 f and 2 f + 1, as V's always. V's count from head_dim on.
    order: Vec<u16>,
}

impl StatsCoder {
    /// Of `head_dim` channels, of which K's first `pairs` turn with its second `pairs`.
    pub fn new(calibrated: bool, head_dim: usize, pairs: usize) -> StatsCoder {
        let log2: Vec<f64> = match calibrated {
            true => FACTOR_LOG2.to_vec(),
            false => (0..256).map(|c| f64::from(c - 128) / 8.0).collect(),
        };
        StatsCoder {
            calibrated,
            factors: log2.iter().map(|&e| libm::exp2(e) as f32).collect(),
            thresholds: log2.windows(2).map(|e| libm::exp2(e[0] + e[1]) as f32).collect(),
            order: (0..head_dim / 2)
                .flat_map(|f| {
                    let [a, b] = pair_channels(f, pairs);
                    [a, b, head_dim + 2 * f, head_dim + 2 * f + 1]
                })
                .map(|c| c as u16)
                .collect(),
        }
    }

    /// Thresholds between neighbouring scale codes, of mean square over squared deviation.
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// Code of a channel's scale from its mean square and its calibrated deviation (1 if free).
    #[inline(always)]
    pub fn scale_code(&self, mean_square: f32, sigma: f32) -> u8 {
        let ratio = mean_square / (sigma * sigma);
        self.thresholds.partition_point(|&t| ratio > t) as u8
    }

    /// Scale of a channel.
    #[inline(always)]
    pub fn scale(&self, code: u8, sigma: f32) -> f32 {
        self.factors[usize::from(code)] * sigma
    }

    /// Code of a block mean and the value it stands for. `step`: an eighth of the calibrated deviation.
    #[inline(always)]
    pub fn mean(&self, mean: f32, step: f32) -> (u16, f32) {
        if self.calibrated {
            let q = (mean / step).round_ties_even().clamp(-32.0, 31.0);
            ((q as i32 + 32) as u16, q * step)
        } else {
            let h = f16::from_f32(mean.clamp(-65504.0, 65504.0));
            (h.to_bits(), h.to_f32())
        }
    }

    /// Value of a mean code.
    #[inline(always)]
    pub fn mean_value(&self, code: u16, step: f32) -> f32 {
        if self.calibrated {
            (i32::from(code & 63) - 32) as f32 * step
        } else {
            f16::from_bits(code).to_f32()
        }
    }

    /// Scale code that sealing tries for a channel in attempt `n` of [`SCALE_ATTEMPTS`]: its deviation's
    /// `own`, a quarter octave less, one more (next among calibrated factors, two steps among free ones), then as much again on
    /// the side where `best` of these lies. None past the ends, or where there is no such side.
    #[inline(always)]
    pub fn candidate(&self, own: u8, best: u8, n: usize) -> Option<u8> {
        let step = if self.calibrated { 1 } else { 2 };
        let (own, best) = (i32::from(own), i32::from(best));
        let c = match n {
            0 => own,
            1 => own - step,
            2 => own + step,
            _ if best == own => return None,
            _ => best + (best - own),
        };
        (0..self.factors.len() as i32).contains(&c).then_some(c as u8)
    }

    /// Writes scale and mean codes of 2 D channels (K's, then V's) into the side area of a page. Keys and values have no byte
    /// in common, so that two may write at once.
    pub fn write(&self, scales: &[u8], means: &[u16], side: &mut [u8]) {
        let n = scales.len();
        let (codes, rest) = side.split_at_mut(n);
        for (i, c) in self.order.iter().map(|c| usize::from(*c)).enumerate() {
            if self.calibrated {
                codes[i] = scales[c] | (means[c] << 4) as u8;
            } else {
                codes[i] = scales[c];
                rest[2 * i..2 * i + 2].copy_from_slice(&means[c].to_le_bytes());
            }
        }
        if self.calibrated {
            rest.fill(0);
            for (i, &c) in self.order.iter().enumerate() {
                let (byte, bit) = high_bits(i, n);
                rest[byte] |= ((means[usize::from(c)] >> 4) << bit) as u8;
            }
        }
    }

    /// Reads what [`StatsCoder::write`] wrote.
    pub fn read(&self, side: &[u8], scales: &mut [u8], means: &mut [u16]) {
        let n = scales.len();
        let (codes, rest) = side.split_at(n);
        for (i, c) in self.order.iter().map(|c| usize::from(*c)).enumerate() {
            if self.calibrated {
                let (byte, bit) = high_bits(i, n);
                scales[c] = codes[i] & 15;
                means[c] = u16::from(codes[i] >> 4) | u16::from(rest[byte] >> bit & 3) << 4;
            } else {
                scales[c] = codes[i];
                means[c] = u16::from_le_bytes([rest[2 * i], rest[2 * i + 1]]);
            }
        }
    }
}

/// K's channels of pair f.
pub fn pair_channels(f: usize, pairs: usize) -> [usize; 2] {
    if f < pairs { [f, f + pairs] } else { [2 * f, 2 * f + 1] }
}

/// Byte behind the first n of place i's highest two bits of the mean's code, and where in it: K's of all pairs, then V's.
fn high_bits(i: usize, n: usize) -> (usize, usize) {
    let (pair, is_v) = (i / 4, i / 2 % 2);
    (is_v * n / 8 + pair / 2, 4 * (pair % 2) + 2 * (i % 2))
}

/// Sum over the tokens of a block in the order that is part of the format: sixteen neighbours in sequence, then the eight
/// partial sums as a balanced tree. (A warp owns sixteen tokens.)
#[inline(always)]
pub fn block_sum(of: impl Fn(usize) -> f32) -> f32 {
    let mut part = [0.0f32; 8];
    for (w, p) in part.iter_mut().enumerate() {
        for i in 0..BLOCK / 8 {
            *p += of(w * (BLOCK / 8) + i);
        }
    }
    ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn side_area_round_trip() {
        for calibrated in [true, false] {
            let n = 256;
            let coder = StatsCoder::new(calibrated, n / 2, 24);
            let scales: Vec<u8> =
                (0..n).map(|i| if calibrated { (i * 7 % 16) as u8 } else { (i * 91) as u8 }).collect();
            let means: Vec<u16> =
                (0..n).map(|i| if calibrated { (i * 11 % 64) as u16 } else { (i * 25013) as u16 }).collect();
            let mut side = vec![0; if calibrated { n * 5 / 4 } else { n * 3 }];
            coder.write(&scales, &means, &mut side);
            let (mut s, mut m) = (vec![0; n], vec![0; n]);
            coder.read(&side, &mut s, &mut m);
            assert_eq!((s, m), (scales, means));
        }
    }

    #[test]
    fn scale_is_within_half_a_step() {
        let coder = StatsCoder::new(true, 64, 32);
        for i in 0..200 {
            let ratio = 2f32.powf(-2.0 + i as f32 * 7.0 / 200.0);
            let got = coder.scale(coder.scale_code(ratio * ratio * 9.0, 3.0), 3.0) / 3.0;
            let off = (got / ratio).log2().abs();
            assert!(off <= if (0.62..2.8).contains(&ratio) { 0.126 } else { 0.63 }, "{ratio} {got}");
        }
        let free = StatsCoder::new(false, 64, 32);
        assert_eq!(free.scale(free.scale_code(0.0, 1.0), 1.0), 2f32.powi(-16));
        assert_eq!(free.scale_code(f32::INFINITY, 1.0), 255);
    }
}
