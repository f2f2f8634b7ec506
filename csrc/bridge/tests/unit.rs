//! Device functions against the codec: every code at every place of a unit, every state of the trellis.

use kakeya_codec::trellis;
use kakeya_codec::unit::{self, CODES, Codes, LANES, unit_bytes};

fn flat(codes: &Codes) -> Vec<u8> {
    codes.concat()
}

/// Every code value at every position and lane, among neighbours of all zeros, all ones and a mixture.
#[test]
fn pack_and_unpack_equal_the_codec_over_all_codes() {
    for width in 1..=6 {
        let top = 1usize << width;
        for value in 0..top {
            for n in 0..CODES {
                for around in 0..3 {
                    let neighbour = |i: usize| match around {
                        0 => 0,
                        1 => top - 1,
                        _ => (i * 37 + 11) % top,
                    };
                    let mut codes: Codes = [[0; LANES]; CODES];
                    for (i, row) in codes.iter_mut().enumerate() {
                        for (lane, c) in row.iter_mut().enumerate() {
                            *c = if i == n { value } else { neighbour(i * LANES + lane) } as u8;
                        }
                    }
                    let (mut ours, mut theirs) = (vec![0; unit_bytes(width)], vec![0xff; unit_bytes(width)]);
                    unit::pack(width, &codes, &mut ours);
                    kakeya_bridge::pack(width, &flat(&codes), &mut theirs).unwrap();
                    assert_eq!(ours, theirs, "width {width} code {value} at {n}");
                    let mut back = vec![0xee; CODES * LANES];
                    kakeya_bridge::unpack(width, &ours, &mut back).unwrap();
                    assert_eq!(flat(&codes), back, "width {width} code {value} at {n}");
                }
            }
        }
    }
}

/// A deterministic sequence of numbers.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *seed >> 33
}

/// A trellis unit's bytes as both pack them.
fn packed(width: usize, path: &Codes, refinement: &Codes) -> Vec<u8> {
    let (mut ours, mut theirs) = (vec![0; unit_bytes(width)], vec![0xff; unit_bytes(width)]);
    unit::pack_trellis(width, path, refinement, &mut ours);
    kakeya_bridge::pack_trellis(width, &flat(path), &flat(refinement), &mut theirs).unwrap();
    assert_eq!(ours, theirs, "width {width}");
    ours
}

/// All 2^16 paths of a unit from all eight states, symbols against the codec's state machine. Of the word before, only the
/// three path bits count.
#[test]
fn trellis_units_equal_the_codec_over_all_paths_and_states() {
    let mut seed = 1;
    for width in 1..=6 {
        for chunk in 0..(1usize << 16) / LANES {
            let path: Codes =
                std::array::from_fn(|n| std::array::from_fn(|l| ((chunk * LANES + l) >> n & 1) as u8));
            let refinement: Codes = std::array::from_fn(|_| {
                std::array::from_fn(|_| (random(&mut seed) % (1 << (width - 1))) as u8)
            });
            let bytes = packed(width, &path, &refinement);
            for state in 0..8usize {
                // The state has u_(-1), u_(-2), u_(-3) at bits 0, 1, 2; the word at bits 31, 29, 27.
                let last = (state & 1) << 31 | (state >> 1 & 1) << 29 | (state >> 2) << 27;
                let mut before: Vec<u32> =
                    (0..LANES).map(|_| (random(&mut seed) as u32 & !0xa800_0000) | last as u32).collect();
                let mut symbols = vec![0; CODES * LANES];
                kakeya_bridge::trellis_symbols(width, &bytes, &mut before, &mut symbols).unwrap();
                for lane in 0..LANES {
                    let mut s = state;
                    for n in 0..CODES {
                        let u = usize::from(path[n][lane]);
                        let want = 4 * usize::from(refinement[n][lane]) + trellis::subset(s, u);
                        let got = usize::from(symbols[n * LANES + lane]);
                        assert_eq!(got, want, "width {width} lane {lane} n {n}");
                        s = trellis::next(s, u);
                    }
                    let left =
                        before[lane] >> 31 | (before[lane] >> 29 & 1) << 1 | (before[lane] >> 27 & 1) << 2;
                    assert_eq!(left as usize, s);
                }
            }
            // Two widths in full, the others over a sample: the path logic knows width 1 and wider ones.
            if !matches!(width, 1 | 3) && chunk >= 64 {
                break;
            }
        }
    }
}

/// Chains through units of all widths in any order.
#[test]
fn trellis_chains_run_on_from_unit_to_unit() {
    let mut seed = 2;
    for _ in 0..200 {
        let mut before = vec![0; LANES];
        let mut state = [0; LANES];
        for _ in 0..8 {
            let width = 1 + random(&mut seed) as usize % 6;
            let mut codes = |top: u64| -> Codes {
                std::array::from_fn(|_| std::array::from_fn(|_| (random(&mut seed) % top) as u8))
            };
            let (path, refinement) = (codes(2), codes(1 << (width - 1)));
            let mut symbols = vec![0; CODES * LANES];
            let bytes = packed(width, &path, &refinement);
            kakeya_bridge::trellis_symbols(width, &bytes, &mut before, &mut symbols).unwrap();
            for n in 0..CODES {
                for lane in 0..LANES {
                    let u = usize::from(path[n][lane]);
                    let want = 4 * usize::from(refinement[n][lane]) + trellis::subset(state[lane], u);
                    assert_eq!(
                        usize::from(symbols[n * LANES + lane]),
                        want,
                        "width {width} lane {lane} n {n}"
                    );
                    state[lane] = trellis::next(state[lane], u);
                }
            }
        }
    }
}
