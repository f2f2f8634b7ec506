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

/// All 2^16 paths of a unit from all eight states, symbols against the codec's state machine.
#[test]
fn trellis_symbols_equal_the_codec_over_all_paths_and_states() {
    for width in 1..=6 {
        for chunk in 0..(1usize << 16) / LANES {
            for past in 0..8usize {
                let mut path: Codes = [[0; LANES]; CODES];
                let mut refinement: Codes = [[0; LANES]; CODES];
                for lane in 0..LANES {
                    let bits = chunk * LANES + lane;
                    for n in 0..CODES {
                        path[n][lane] = (bits >> n & 1) as u8;
                        refinement[n][lane] = ((bits * 7 + n * 13) % (1 << (width - 1))) as u8;
                    }
                }
                let mut bytes = vec![0; unit_bytes(width)];
                unit::pack(1, &path, &mut bytes[..unit_bytes(1)]);
                if width > 1 {
                    unit::pack(width - 1, &refinement, &mut bytes[unit_bytes(1)..]);
                }
                // Window bits 2, 1, 0 are u_(-1), u_(-2), u_(-3); the codec's state has them at bits 0, 1, 2.
                let state = (past >> 2 & 1) | (past & 2) | (past & 1) << 2;
                let mut memory = vec![past as u8; LANES];
                let mut symbols = vec![0; CODES * LANES];
                kakeya_bridge::trellis_symbols(width, &bytes, &mut memory, &mut symbols).unwrap();
                for lane in 0..LANES {
                    let mut s = state;
                    for n in 0..CODES {
                        let u = usize::from(path[n][lane]);
                        let want = 4 * usize::from(refinement[n][lane]) + trellis::subset(s, u);
                        assert_eq!(
                            usize::from(symbols[n * LANES + lane]),
                            want,
                            "width {width} lane {lane} n {n}"
                        );
                        s = trellis::next(s, u);
                    }
                    let left = (s >> 2 & 1) | (s & 2) | (s & 1) << 2;
                    assert_eq!(usize::from(memory[lane]), left);
                }
            }
            // One width in full, the others over a sample: the path logic does not depend on the width.
            if width != 3 && chunk >= 8 {
                break;
            }
        }
    }
}
