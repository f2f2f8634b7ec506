//! Keys and values of a block from a few bytes: a ground and strokes over it. Raw rows would take 64 KiB of input, which
//! a fuzzer cannot search.

use kakeya_codec::{BLOCK, Codec};

use crate::common::{self, Noise};
use crate::source::Source;

/// Strokes of an input at most.
const STROKES: usize = 12;

/// K and V `[128][head_dim]` of a block.
pub fn rows(
    source: &mut Source,
    codec: &Codec,
    (layer, head, block): (usize, usize, usize),
) -> (Vec<f32>, Vec<f32>) {
    let d = codec.shape().head_dim;
    let (mut k, mut v) = match source.below(4) {
        0 => common::natural_block(codec, layer, head, block, u64::from(source.u8())),
        1 => (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]),
        2 => {
            let value = source.f32();
            (vec![value; BLOCK * d], vec![value; BLOCK * d])
        }
        _ => {
            let (mut noise, factor) = (Noise(u64::from(source.u16())), source.f32());
            let mut paint = || (0..BLOCK * d).map(|_| noise.gaussian() * factor).collect::<Vec<f32>>();
            (paint(), paint())
        }
    };
    for _ in 0..STROKES {
        if source.is_empty() {
            break;
        }
        let (what, token, channel) = (source.u8(), source.below(BLOCK), source.below(256) % d);
        let rows = if what & 1 == 0 { &mut k } else { &mut v };
        let value = source.f32();
        match what >> 1 & 7 {
            0 => rows[token * d + channel] = value,
            1 => rows[token * d..(token + 1) * d].fill(value),
            2 => rows.iter_mut().skip(channel).step_by(d).for_each(|x| *x = value),
            3 => rows[token * d..(token + 1) * d].iter_mut().for_each(|x| *x *= value),
            4 => rows.iter_mut().skip(channel).step_by(d).for_each(|x| *x *= value),
            5 => rows.iter_mut().for_each(|x| *x *= value),
            6 => rows[token * d..].iter_mut().for_each(|x| *x += value),
            _ => {
                let bytes = source.take(16);
                for (x, byte) in rows[token * d + channel..].iter_mut().zip(bytes) {
                    *x = f32::from(*byte as i8) / 16.0;
                }
            }
        }
    }
    (k, v)
}
