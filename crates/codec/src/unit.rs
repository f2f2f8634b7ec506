//! The order of codes inside a unit: the order in which the GPU's `mma.m16n8k16` wants its A operand, so that a kernel
//! reads a lane's codes with one or two loads and no shuffle; and the order of a stream's tokens in its units.
//!
//! A unit holds 512 codes of one width: 32 lanes x 16 codes. Lane l has row g = l / 4 and column t = l % 4. A lane's 16
//! codes are indexed by (h, m, c): h the half of a half2 register, m the register of a class, c the class of column
//! pairs (K) or rows (V). Position in the lane: n = 8h + 4m + c.
//!
//! | stream, unit | channel | token |
//! |---|---|---|
//! | K, 32 channels x 16 tokens | 16 (c/2) + 8 (c%2) + 2t + h | row g + 8m of tile `group` |
//! | V, 32 channels x 16 tokens | g + 8c | 16 group + 2t + 8m + h |
//! | K, 16 channels x 32 tokens | 8 (c%2) + 2t + h | row g + 8m of tile 2 group + c/2 |
//! | V, 16 channels x 32 tokens | g + 8 (c%2) | 32 group + 16 (c/2) + 2t + 8m + h |
//!
//! K's tiles of 16 tokens come in pairs that mirror each other around the block's centre: row r of tile 2i is token
//! 64 + 16i + r, row r of tile 2i + 1 is token 63 - 16i - r. The two stand equally far from the centre, on either side, so
//! that one product with cosines and one with sines of that distance serve both.
//!
//! Bits: each half h owns one 16-bit half of every 32-bit word, so `word & mask` gives the codes of a half2 as two fp16
//! subnormals. Words and their order by width:
//!
//! | width | per lane | placement in each 16-bit half (bit of code (m, c)) |
//! |---|---|---|
//! | 1 | u16 | byte h: 4m + c |
//! | 2 | u32 | 8m + 2c |
//! | 3 | u32, u16 | word: (0,c<3) 3c, (1,c<2) 9 + 3c, bit 15 top bit of (1,2); byte h of the u16: (0,3) 0, (1,3) 3, low bits of (1,2) 6 |
//! | 4 | 2 u32 | word c/2: 8m + 4 (c%2) |
//! | 5 | 2 u32, u16 | word m: (c<3) 5c, bit 15 top bit of (m,3); byte h of the u16: low bits of (m,3) 4m |
//! | 6 | 2 u32, u32 | word m: (c<2) 6c, 12 high bits of (m,3); third word: (m,2) 6m, low bits of (m,3) 12 + 2m |
//!
//! The first column's words of all 32 lanes come first (a pair of words of a lane stays together), then the second
//! column's.
//!
//! A trellis unit of width 1 is its path bits u in the layout of width 1. A wider one begins with codes `2 u + top` in the
//! layout of width 2, top the highest bit of the (w - 1)-bit refinement: a lane's word has path bit n at bit 2n + 1, so that
//! three shifts by even numbers give the trellis' parities of all codes, and the last three path bits, which the chain
//! takes on to its next unit, are bits 27, 29 and 31. The refinement's other w - 2 bits follow in the layout of width w - 2;
//! at w = 3 the single bit lies in byte h of the lane's u16 in the order of [`SPREAD`].

// Lanes index words, columns and codes at once; iterators over one of them would hide the format.
#![allow(clippy::needless_range_loop)]

use crate::layout::UnitShape;
use crate::shape::BLOCK;

/// Lanes of a warp.
pub const LANES: usize = 32;
/// Codes of a lane in a unit.
pub const CODES: usize = 16;

/// Bytes of a unit whose codes have `width` bits.
pub const fn unit_bytes(width: usize) -> usize {
    64 * width
}

/// Which stream a unit belongs to: their fragments differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    K,
    V,
}

/// Tokens of a tile, the rows or columns of one matrix instruction.
const TILE: usize = 16;

/// Token of a block at row `r` of K's tile `tile`.
#[inline(always)]
pub fn tile_token(tile: usize, r: usize) -> usize {
    let distance = TILE * (tile / 2) + r;
    if tile.is_multiple_of(2) { BLOCK / 2 + distance } else { BLOCK / 2 - 1 - distance }
}

/// (tile of K, row) of a token of a block: the inverse of [`tile_token`].
#[inline(always)]
pub fn token_tile(token: usize) -> (usize, usize) {
    let below = token < BLOCK / 2;
    let distance = if below { BLOCK / 2 - 1 - token } else { token - BLOCK / 2 };
    (2 * (distance / TILE) + usize::from(below), distance % TILE)
}

/// (channel in the unit, token in the block) of code `n` of `lane` in a unit of token group `group`.
#[inline(always)]
pub fn place(stream: Stream, unit: UnitShape, group: usize, lane: usize, n: usize) -> (usize, usize) {
    let (g, t) = (lane / 4, lane % 4);
    let (h, m, c) = (n / 8, n / 4 % 2, n % 4);
    // Channels of 8 and tile of this code.
    let (class, tile) = if unit.channels == 32 { (c, group) } else { (c % 2, 2 * group + c / 2) };
    match stream {
        Stream::K => (8 * class + 2 * t + h, tile_token(tile, g + 8 * m)),
        Stream::V => (g + 8 * class, TILE * tile + 2 * t + 8 * m + h),
    }
}

/// (group, lane, code n) that holds a (channel in its unit, token in the block): the inverse of [`place`].
#[inline(always)]
pub fn locate(stream: Stream, unit: UnitShape, channel: usize, token: usize) -> (usize, usize, usize) {
    let (tile, token) = match stream {
        Stream::K => token_tile(token),
        Stream::V => (token / TILE, token % TILE),
    };
    let (row, column) = match stream {
        Stream::K => (token, channel),
        Stream::V => (channel, token),
    };
    let (g, t, h) = (row % 8, column % 8 / 2, column % 2);
    let (m, class) = (token / 8, channel / 8);
    let (group, c) = if unit.channels == 32 { (tile, class) } else { (tile / 2, class + 2 * (tile % 2)) };
    (group, 4 * g + t, 8 * h + 4 * m + c)
}

/// Byte of a slot, inside its unit, that holds a channel: a lane's bytes lie together, in the order of its codes.
#[inline(always)]
pub fn slot_byte(stream: Stream, unit: UnitShape, channel: usize) -> usize {
    let (class, classes) = (channel / 8, unit.channels / 8);
    match stream {
        Stream::K => 2 * classes * (channel % 8 / 2) + 2 * class + channel % 2,
        Stream::V => classes * (channel % 8) + class,
    }
}

/// Codes of a unit by position in the lane, then lane.
pub type Codes = [[u8; LANES]; CODES];

/// A lane's words: two of the first column, one of the second.
type Words = [[u32; LANES]; 3];

/// One piece of a code: `bits` bits of the code from `code_bit` on lie in word `word` from `bit` on (plus 16h, or 8h in
/// the byte-wise words of widths 1, 3 and 5).
struct Piece {
    word: usize,
    bit: u32,
    code_bit: u32,
    bits: u32,
}

const fn piece(word: usize, bit: u32, code_bit: u32, bits: u32) -> Piece {
    Piece { word, bit, code_bit, bits }
}

/// The pieces of code (m, c) at a width; the second has zero bits where one is enough.
#[inline(always)]
fn pieces(width: usize, m: u32, c: u32) -> [Piece; 2] {
    let none = piece(0, 0, 0, 0);
    let mw = m as usize;
    match (width, m, c) {
        (1, _, _) => [piece(2, 4 * m + c, 0, 1), none],
        (2, _, _) => [piece(0, 8 * m + 2 * c, 0, 2), none],
        (3, 0, 0..3) => [piece(0, 3 * c, 0, 3), none],
        (3, 1, 0..2) => [piece(0, 9 + 3 * c, 0, 3), none],
        (3, 1, 2) => [piece(0, 15, 2, 1), piece(2, 6, 0, 2)],
        (3, _, _) => [piece(2, 3 * m, 0, 3), none],
        (4, _, _) => [piece(c as usize / 2, 8 * m + 4 * (c % 2), 0, 4), none],
        (5, _, 0..3) => [piece(mw, 5 * c, 0, 5), none],
        (5, _, _) => [piece(mw, 15, 4, 1), piece(2, 4 * m, 0, 4)],
        (6, _, 0..2) => [piece(mw, 6 * c, 0, 6), none],
        (6, _, 2) => [piece(2, 6 * m, 0, 6), none],
        (6, _, _) => [piece(mw, 12, 2, 4), piece(2, 12 + 2 * m, 0, 2)],
        _ => unreachable!("widths are 1..=6"),
    }
}

/// Words of the first column and bytes of the second column's words, per lane.
const fn columns(width: usize) -> (usize, usize) {
    match width {
        1 => (0, 2),
        2 => (1, 0),
        3 => (1, 2),
        4 => (2, 0),
        5 => (2, 2),
        _ => (2, 4),
    }
}

#[inline(always)]
fn half_shift(width: usize, word: usize, h: u32) -> u32 {
    if word == 2 && width != 6 { 8 * h } else { 16 * h }
}

/// Packs codes of `width` bits (1..=6) into `unit_bytes(width)` bytes.
#[inline(always)]
pub fn pack(width: usize, codes: &Codes, out: &mut [u8]) {
    let mut words: Words = [[0; LANES]; 3];
    for (n, row) in codes.iter().enumerate() {
        let (h, m, c) = (n as u32 / 8, n as u32 / 4 % 2, n as u32 % 4);
        for p in pieces(width, m, c) {
            if p.bits > 0 {
                let shift = p.bit + half_shift(width, p.word, h);
                let mask = (1u32 << p.bits) - 1;
                for (w, &code) in words[p.word].iter_mut().zip(row) {
                    *w |= ((u32::from(code) >> p.code_bit) & mask) << shift;
                }
            }
        }
    }
    let (first, second) = columns(width);
    for lane in 0..LANES {
        for w in 0..first {
            let at = (lane * first + w) * 4;
            out[at..at + 4].copy_from_slice(&words[w][lane].to_le_bytes());
        }
        let at = LANES * first * 4 + lane * second;
        out[at..at + second].copy_from_slice(&words[2][lane].to_le_bytes()[..second]);
    }
}

/// Unpacks `unit_bytes(width)` bytes.
#[inline(always)]
pub fn unpack(width: usize, bytes: &[u8], codes: &mut Codes) {
    let mut words: Words = [[0; LANES]; 3];
    let (first, second) = columns(width);
    for lane in 0..LANES {
        for w in 0..first {
            let at = (lane * first + w) * 4;
            words[w][lane] = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        }
        let mut tail = [0; 4];
        let at = LANES * first * 4 + lane * second;
        tail[..second].copy_from_slice(&bytes[at..at + second]);
        words[2][lane] = u32::from_le_bytes(tail);
    }
    for (n, row) in codes.iter_mut().enumerate() {
        let (h, m, c) = (n as u32 / 8, n as u32 / 4 % 2, n as u32 % 4);
        let [a, b] = pieces(width, m, c);
        let sa = a.bit + half_shift(width, a.word, h);
        let ma = (1u32 << a.bits) - 1;
        for (code, &w) in row.iter_mut().zip(&words[a.word]) {
            *code = (((w >> sa) & ma) << a.code_bit) as u8;
        }
        if b.bits > 0 {
            let sb = b.bit + half_shift(width, b.word, h);
            let mb = (1u32 << b.bits) - 1;
            for (code, &w) in row.iter_mut().zip(&words[b.word]) {
                *code |= (((w >> sb) & mb) << b.code_bit) as u8;
            }
        }
    }
}

/// Bit, in byte h of a lane's u16, of the lowest refinement bit of code k = 4m + c of a trellis unit of width 3. With the
/// byte in both bytes of a 16-bit half x, `e = x & 0x00ff | x << 2 & 0xff00` has those of even k at bit 2k + 3, and `e << 1`
/// those of odd k at bit 2k + 1: every fourth bit, where the words of width 2 have pairs of codes.
pub const SPREAD: [usize; 8] = [3, 2, 7, 6, 1, 0, 5, 4];

/// Packs path bits and refinements of `width - 1` bits of a trellis unit into its `unit_bytes(width)` bytes.
#[inline(always)]
pub fn pack_trellis(width: usize, path: &Codes, refinement: &Codes, out: &mut [u8]) {
    if width == 1 {
        return pack(1, path, out);
    }
    let low_bits = width - 2;
    let (head, tail) = out.split_at_mut(unit_bytes(2));
    let mut codes = *path;
    for (row, refinement) in codes.iter_mut().zip(refinement) {
        row.iter_mut().zip(refinement).for_each(|(c, r)| *c = 2 * *c + (r >> low_bits));
    }
    pack(2, &codes, head);
    if low_bits == 0 {
        return;
    }
    for (n, row) in refinement.iter().enumerate() {
        let to = &mut codes[if low_bits == 1 { n / 8 * 8 + SPREAD[n % 8] } else { n }];
        to.iter_mut().zip(row).for_each(|(c, r)| *c = r & ((1 << low_bits) - 1));
    }
    pack(low_bits, &codes, tail);
}

/// Inverse of [`pack_trellis`].
#[inline(always)]
pub fn unpack_trellis(width: usize, bytes: &[u8], path: &mut Codes, refinement: &mut Codes) {
    if width == 1 {
        *refinement = [[0; LANES]; CODES];
        return unpack(1, bytes, path);
    }
    let low_bits = width - 2;
    let (head, tail) = bytes.split_at(unit_bytes(2));
    let mut low: Codes = [[0; LANES]; CODES];
    if low_bits > 0 {
        unpack(low_bits, tail, &mut low);
    }
    unpack(2, head, path);
    for (n, (row, path)) in refinement.iter_mut().zip(path).enumerate() {
        let low = &low[if low_bits == 1 { n / 8 * 8 + SPREAD[n % 8] } else { n }];
        for ((r, u), low) in row.iter_mut().zip(path).zip(low) {
            *r = (*u & 1) << low_bits | low;
            *u >>= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_cover_the_block_once() {
        for unit in [UnitShape { channels: 32, tokens: 16 }, UnitShape { channels: 16, tokens: 32 }] {
            for stream in [Stream::K, Stream::V] {
                let mut seen = vec![false; unit.channels * BLOCK];
                for group in 0..unit.groups() {
                    for lane in 0..LANES {
                        for n in 0..CODES {
                            let (c, t) = place(stream, unit, group, lane, n);
                            assert!(c < unit.channels && t < BLOCK);
                            assert!(!std::mem::replace(&mut seen[c * BLOCK + t], true));
                            assert_eq!(locate(stream, unit, c, t), (group, lane, n));
                        }
                    }
                }
            }
        }
    }

    /// Rows of a pair of K's tiles stand equally far from the centre, which lies between tokens 63 and 64.
    #[test]
    fn tiles_of_a_pair_mirror_each_other() {
        for tile in (0..8).step_by(2) {
            for r in 0..16 {
                assert_eq!(tile_token(tile, r), 64 + 8 * tile + r);
                assert_eq!(tile_token(tile, r) + tile_token(tile + 1, r), 127);
            }
        }
    }

    /// The channels of a lane's codes are neighbours in a slot, in the order of the codes.
    #[test]
    fn slot_bytes_follow_the_lanes() {
        for unit in [UnitShape { channels: 32, tokens: 16 }, UnitShape { channels: 16, tokens: 32 }] {
            let classes = unit.channels / 8;
            for lane in 0..LANES {
                for c in 0..classes {
                    for h in 0..2 {
                        let (channel, _) = place(Stream::K, unit, 0, lane, 8 * h + c);
                        assert_eq!(slot_byte(Stream::K, unit, channel), lane % 4 * 2 * classes + 2 * c + h);
                    }
                    let (channel, _) = place(Stream::V, unit, 0, lane, c);
                    assert_eq!(slot_byte(Stream::V, unit, channel), lane / 4 * classes + c);
                }
            }
        }
    }

    /// Every single bit of every code survives, alone and with all others set.
    #[test]
    fn pack_and_unpack_are_inverse_bit_by_bit() {
        for width in 1..=6 {
            let full = (1u8 << width) - 1;
            for n in 0..CODES {
                for lane in [0, 1, 13, 31] {
                    for bit in 0..width {
                        for base in [0, full] {
                            let mut codes: Codes = [[base; LANES]; CODES];
                            codes[n][lane] ^= 1 << bit;
                            let mut bytes = vec![0; unit_bytes(width)];
                            pack(width, &codes, &mut bytes);
                            let mut back: Codes = [[0xee; LANES]; CODES];
                            unpack(width, &bytes, &mut back);
                            assert_eq!(codes, back, "width {width} n {n} lane {lane} bit {bit}");
                        }
                    }
                }
            }
        }
    }

    /// The same of a trellis unit's path bits and refinements.
    #[test]
    fn trellis_units_are_inverse_bit_by_bit() {
        for width in 1..=6 {
            let full = (1u8 << (width - 1)) - 1;
            for n in 0..CODES {
                for lane in [0, 1, 13, 31] {
                    for bit in 0..width {
                        for base in [false, true] {
                            let mut path: Codes = [[u8::from(base); LANES]; CODES];
                            let mut refinement: Codes = [[if base { full } else { 0 }; LANES]; CODES];
                            match bit {
                                0 => path[n][lane] ^= 1,
                                _ => refinement[n][lane] ^= 1 << (bit - 1),
                            }
                            let mut bytes = vec![0; unit_bytes(width)];
                            pack_trellis(width, &path, &refinement, &mut bytes);
                            let mut back: [Codes; 2] = [[[0xee; LANES]; CODES]; 2];
                            let [p, r] = &mut back;
                            unpack_trellis(width, &bytes, p, r);
                            assert_eq!([path, refinement], back, "width {width} n {n} lane {lane} bit {bit}");
                        }
                    }
                }
            }
        }
    }

    /// What a kernel reads from a lane's words, whose bits the format promises.
    #[test]
    fn a_lanes_words_have_path_bits_and_refinements_where_kernels_look() {
        let path: Codes =
            std::array::from_fn(|n| std::array::from_fn(|l| ((n * 7 + l * 5 + n * l) % 3 % 2) as u8));
        let word = |bytes: &[u8], at: usize, size: usize| {
            bytes[at..at + size].iter().rev().fold(0u32, |w, &b| w << 8 | u32::from(b))
        };
        for width in 2..=6usize {
            let refinement: Codes = std::array::from_fn(|n| {
                std::array::from_fn(|l| ((n * 11 + l * 3 + n * l * 5) % (1 << (width - 1))) as u8)
            });
            let mut bytes = vec![0; unit_bytes(width)];
            pack_trellis(width, &path, &refinement, &mut bytes);
            for lane in 0..LANES {
                let p = word(&bytes, 4 * lane, 4);
                for n in 0..CODES {
                    assert_eq!(p >> (2 * n + 1) & 1, u32::from(path[n][lane]));
                    assert_eq!(p >> (2 * n) & 1, u32::from(refinement[n][lane]) >> (width - 2));
                }
                if width == 3 {
                    let low = word(&bytes, unit_bytes(2) + 2 * lane, 2);
                    for h in 0..2 {
                        let x = (low >> (8 * h) & 0xff) * 0x0101;
                        let e = x & 0x00ff | x << 2 & 0xff00;
                        for k in 0..8 {
                            let bit = if k % 2 == 0 { e >> (2 * k + 3) } else { e << 1 >> (2 * k + 1) };
                            assert_eq!(bit & 1, u32::from(refinement[8 * h + k][lane]) & 1);
                        }
                    }
                }
            }
        }
    }
}
