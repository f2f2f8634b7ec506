//! The attention kernels' way from codes to matrix operands, against the codec's alphabets.

use kakeya_codec::fragments::{alphabet, code_bit, table_scale};
use kakeya_codec::grid::{Grid, MAX_WIDTH};
use kakeya_codec::recipe::Quantizer;
use kakeya_codec::trellis;
use kakeya_codec::unit::{self, CODES, Codes, LANES, unit_bytes};

const UNIFORM: u32 = 0;
const CUBIC: u32 = 1;
const TRELLIS: u32 = 2;

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *seed >> 33
}

fn codes(seed: &mut u64, bits: usize) -> Codes {
    std::array::from_fn(|_| std::array::from_fn(|_| (random(seed) & ((1 << bits) - 1)) as u8))
}

fn points(quantizer: u32, width: usize, narrow: bool, unit: &[u8], before: &[u32], gamma: u32) -> Vec<f32> {
    let mut points = vec![f32::NAN; CODES * LANES];
    kakeya_bridge::dequantise(quantizer, width, narrow, unit, before, gamma, &mut points).unwrap();
    points
}

/// Every code value at every position and lane, all others of another value: exactly the code.
#[test]
fn uniform_codes_are_numbers_of_their_value() {
    for width in 1..=MAX_WIDTH {
        for value in 0..1usize << width {
            for n in 0..CODES {
                let other = (value * 5 + 3) % (1 << width);
                let all: Codes = std::array::from_fn(|i| [if i == n { value } else { other } as u8; LANES]);
                let mut unit = vec![0; unit_bytes(width)];
                unit::pack(width, &all, &mut unit);
                for narrow in [false, true] {
                    let got = points(UNIFORM, width, narrow, &unit, &[0; LANES], 0);
                    for (i, x) in got.iter().enumerate() {
                        assert_eq!(*x, f32::from(all[i / LANES][i % LANES]), "width {width} n {n} at {i}");
                    }
                }
            }
        }
    }
}

/// fp16 rounds a point twice: within 2^-10 of it.
fn assert_point(got: f32, factor: f32, want: f32, what: &str) {
    assert!((got * factor - want).abs() <= want.abs() / 1024.0, "{what}: {} for {want}", got * factor);
}

#[test]
fn lloyd_max_codes_are_their_levels() {
    let mut seed = 3;
    for width in 1..=MAX_WIDTH {
        let grid = Grid::new(Quantizer::LloydMax, width);
        let [gamma, factor] = alphabet(width, &grid);
        for _ in 0..64 {
            let all = codes(&mut seed, width);
            let mut unit = vec![0; unit_bytes(width)];
            unit::pack(width, &all, &mut unit);
            for (i, x) in points(CUBIC, width, false, &unit, &[0; LANES], gamma).iter().enumerate() {
                let code = all[i / LANES][i % LANES];
                let what = format!("width {width} code {code} at {i}");
                assert_point(*x, f32::from_bits(factor), grid.points[usize::from(code)], &what);
            }
        }
    }
}

/// Random paths and refinements of all widths, from all states of the chain.
#[test]
fn trellis_codes_are_their_points() {
    let mut seed = 4;
    for width in 1..=MAX_WIDTH {
        let grid = Grid::new(Quantizer::Trellis, width);
        let [gamma, factor] = alphabet(width, &grid);
        for round in 0..256usize {
            let (path, refinement) = (codes(&mut seed, 1), codes(&mut seed, width - 1));
            let mut unit = vec![0; unit_bytes(width)];
            unit::pack_trellis(width, &path, &refinement, &mut unit);
            // u_(-1), u_(-2), u_(-3) at bits 31, 29, 27; the others are another unit's refinements.
            let state = round % 8;
            let last = (state & 1) << 31 | (state >> 1 & 1) << 29 | (state >> 2) << 27;
            let before: Vec<u32> =
                (0..LANES).map(|_| (random(&mut seed) as u32 & !0xa800_0000) | last as u32).collect();
            let got = points(TRELLIS, width, false, &unit, &before, gamma);
            for lane in 0..LANES {
                let mut s = state;
                for n in 0..CODES {
                    let u = usize::from(path[n][lane]);
                    let symbol = 4 * usize::from(refinement[n][lane]) + trellis::subset(s, u);
                    s = trellis::next(s, u);
                    let what = format!("width {width} symbol {symbol} lane {lane} n {n}");
                    assert_point(got[n * LANES + lane], f32::from_bits(factor), grid.points[symbol], &what);
                }
            }
        }
    }
}

/// The kernels count on the factor that the codec puts into the table of offsets.
#[test]
fn table_of_offsets_has_the_kernels_scale() {
    for (quantizer, number) in
        [(Quantizer::Uniform, UNIFORM), (Quantizer::LloydMax, CUBIC), (Quantizer::Trellis, TRELLIS)]
    {
        assert_eq!(kakeya_bridge::table_scale(number).unwrap(), table_scale(quantizer), "{quantizer:?}");
    }
}

/// The records of heads scale queries and sums by the bits at which kernels read codes.
#[test]
fn codes_are_read_at_the_bits_of_the_records() {
    for width in 0..=MAX_WIDTH {
        for class in 0..4 {
            for narrow in [false, true] {
                let kernels = kakeya_bridge::uniform_code_bit(width as u32, class as u32, narrow);
                assert_eq!(
                    code_bit(width, class, narrow),
                    kernels as i32,
                    "width {width} class {class} {narrow}"
                );
            }
        }
    }
}
