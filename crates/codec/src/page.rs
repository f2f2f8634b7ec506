//! A page's header and the places of its units and slots: what both implementations of seal and open share.

use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::layout::{HEADER, MAGIC, NO_SLOT, PageLayout, UnitShape};
use crate::recipe::MAX_SLOTS;
use crate::rows::Rows;
use crate::shape::BLOCK;
use crate::unit::{Stream, slot_byte, unit_bytes};
use half::f16;

/// Largest magnitude that a page accepts. Real keys and values stay below 10^4; beyond 2^24 squares and sums of f32 would
/// lose their meaning, so such input is refused like a NaN.
pub const MAX_ABS: f32 = 16_777_216.0;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub block_index: u32,
    pub used: usize,
    /// Token of each used slot.
    pub tokens: [u8; MAX_SLOTS],
}

impl Header {
    pub fn write(&self, page: &mut [u8]) {
        page[..2].copy_from_slice(&MAGIC.to_le_bytes());
        page[2] = 0;
        page[3] = self.used as u8;
        page[4..8].copy_from_slice(&self.block_index.to_le_bytes());
        page[8..HEADER].fill(NO_SLOT);
        page[8..8 + self.used].copy_from_slice(&self.tokens[..self.used]);
    }

    /// Reads and checks a header.
    pub fn read(codec: &Codec, layout: &PageLayout, page: &[u8]) -> Result<Header> {
        let bad = |m: String| Err(Error::BadPage(m));
        let magic = u16::from_le_bytes([page[0], page[1]]);
        let [letter, version] = MAGIC.to_le_bytes();
        if page[0] == letter && page[1] != version {
            return Err(Error::WrongVersion {
                what: "page: format version",
                found: page[1].to_string(),
                expected: version.to_string(),
            });
        }
        if magic != MAGIC {
            return bad(format!("begins with {magic:#06x}, a sealed page begins with {MAGIC:#06x}"));
        }
        if page[2] != 0 {
            return bad(format!("flags are {:#04x}; this version knows none", page[2]));
        }
        let block_index = u32::from_le_bytes([page[4], page[5], page[6], page[7]]);
        let used = usize::from(page[3]);
        if used > layout.num_slots {
            return bad(format!("{used} exact slots, the layer's pages have {}", layout.num_slots));
        }
        if block_index as usize >= codec.shape().max_blocks() {
            return bad(format!(
                "block index {block_index}, the longest sequence has {}",
                codec.shape().max_blocks()
            ));
        }
        let mut tokens = [NO_SLOT; MAX_SLOTS];
        tokens[..used].copy_from_slice(&page[8..8 + used]);
        if let Some(t) = tokens[..used].iter().find(|t| usize::from(**t) >= BLOCK) {
            return bad(format!("slot of token {t}; a block has {BLOCK}"));
        }
        Ok(Header { block_index, used, tokens })
    }
}

/// Byte offset in the page of unit `u` of token group `group`, for a stream whose codes begin at `start`.
#[inline(always)]
pub fn unit_offset(start: usize, widths: &[u8], group: usize, u: usize) -> usize {
    let bits = |w: &[u8]| w.iter().map(|&b| usize::from(b)).sum::<usize>();
    start + unit_bytes(1) * (group * bits(widths) + bits(&widths[..u]))
}

/// First byte of V's codes: K's come first.
#[inline(always)]
pub fn v_start(layout: &PageLayout, k_widths: &[u8]) -> usize {
    unit_offset(layout.codes_offset, k_widths, layout.unit.groups(), 0)
}

/// Loads 128 rows of head_dim as f32, refusing what is not finite or beyond [`MAX_ABS`].
#[inline(always)]
pub fn load_rows(
    stream: &'static str,
    (layer, head, block): (usize, usize, usize),
    rows: &Rows,
    d: usize,
    out: &mut [f32],
) -> Result<()> {
    for (j, row) in out.chunks_exact_mut(d).enumerate() {
        rows.load(j, row);
        // NaN compares false, so one pass finds all three kinds.
        if !row.iter().fold(true, |ok, x| ok & (x.abs() <= MAX_ABS)) {
            let channel = row.iter().position(|x| x.is_nan() || x.abs() > MAX_ABS).unwrap_or(0);
            return Err(Error::NonFinite {
                stream,
                layer,
                head,
                block,
                token: j,
                channel,
                value: row[channel],
            });
        }
    }
    Ok(())
}

/// Tokens with the highest scores, best first; of equal scores the earlier token.
pub fn best_tokens(score: &[f32; BLOCK], n: usize) -> Vec<u8> {
    let mut order: Vec<u8> = (0..BLOCK as u8).collect();
    order.sort_by(|&a, &b| score[usize::from(b)].total_cmp(&score[usize::from(a)]));
    order.truncate(n);
    order
}

/// What the codes leave of an exact token's row, in 8 bits: `scale` and `codes` such that code * scale is that rest.
/// Positions in code order; bytes in the order of [`slot_byte`].
#[inline(always)]
pub fn code_exact(stream: Stream, unit: UnitShape, rest: &[f32], codes: &mut [u8]) -> f16 {
    let peak = rest.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = f16::from_f32((peak / 127.0).min(65504.0));
    let s = scale.to_f32();
    for (codes, rest) in codes.chunks_exact_mut(unit.channels).zip(rest.chunks_exact(unit.channels)) {
        for (channel, x) in rest.iter().enumerate() {
            // A peak so small that its scale rounds to zero is zero at the precision of the slot.
            let q = if s > 0.0 { (x / s).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
            codes[slot_byte(stream, unit, channel)] = q as i8 as u8;
        }
    }
    scale
}

/// Adds slot `i` of a stream: `add(position in code order, value)`.
#[inline(always)]
pub fn read_slot(
    layout: &PageLayout,
    page: &[u8],
    stream: Stream,
    i: usize,
    mut add: impl FnMut(usize, f32),
) {
    let (codes, scale) = slot_places(layout, stream, i);
    let scale = f16::from_le_bytes([page[scale], page[scale + 1]]).to_f32();
    // Only a damaged page holds anything else; a value keeps open() total.
    let scale = if scale.is_finite() { scale } else { 0.0 };
    let channels = layout.unit.channels;
    for (u, codes) in page[codes..codes + layout.head_dim].chunks_exact(channels).enumerate() {
        for channel in 0..channels {
            let code = codes[slot_byte(stream, layout.unit, channel)] as i8;
            add(u * channels + channel, f32::from(code) * scale);
        }
    }
}

/// Writes slot `i` of a stream from the rest, in code order, that the codes leave.
pub fn write_slot(layout: &PageLayout, page: &mut [u8], stream: Stream, i: usize, rest: &[f32]) {
    let (codes, at) = slot_places(layout, stream, i);
    let scale = code_exact(stream, layout.unit, rest, &mut page[codes..codes + layout.head_dim]);
    page[at..at + 2].copy_from_slice(&scale.to_le_bytes());
}

/// First byte of a slot's codes, and of its scale.
fn slot_places(layout: &PageLayout, stream: Stream, i: usize) -> (usize, usize) {
    let (d, n) = (layout.head_dim, layout.num_slots);
    let second = usize::from(stream == Stream::V);
    let scales = layout.slots_offset + 2 * n * d;
    (layout.slots_offset + (second * n + i) * d, scales + 4 * i + 2 * second)
}
