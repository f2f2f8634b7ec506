//! Where things lie in a page. A page is self-contained: header, codes, block statistics and exact slots of one
//! (block, KV head); nothing outside is needed but the static tables of the recipe and its calibration.
//!
//! ```text
//! 0        header      16 B   magic u16, flags u8, slots used u8, block index u32, slot tokens u8 x 8
//! 16       K codes     64 B * token groups * sum of K widths      fragment order, see `unit`
//! ...      V codes     64 B * token groups * sum of V widths      K + V widths sum to `code_bits` in every head
//! ...      statistics  calibrated: scale nibbles D, mean low nibbles D, mean high crumbs D/2   (K's channels, then V's)
//!                      free:       scale bytes 2D, means f16 2D                                (K's channels, then V's)
//! ...      slots       K codes i8 [num_slots][D], V codes i8 [num_slots][D], scales f16 [num_slots][K, V]
//! ...      zero padding to the page size
//! ```
//!
//! All integers are little-endian.

use crate::error::{Error, Result};
use crate::recipe::{MAX_SLOTS, Recipe};
use crate::shape::BLOCK;

/// Header bytes.
pub const HEADER: usize = 16;
/// First two bytes of a page: 'K' and format version 2.
pub const MAGIC: u16 = u16::from_le_bytes([b'K', 2]);
/// Header byte of a slot index that is not used.
pub const NO_SLOT: u8 = 0xff;

/// A unit is 512 codes of one width: what one warp's matrix instructions take at a time (see [`crate::unit`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnitShape {
    pub channels: usize,
    pub tokens: usize,
}

impl UnitShape {
    /// Unit of a head dimension. 64 channels in units of 32 would leave two widths a stream: too coarse.
    pub fn of(head_dim: usize) -> UnitShape {
        if head_dim == 64 {
            UnitShape { channels: 16, tokens: 32 }
        } else {
            UnitShape { channels: 32, tokens: 16 }
        }
    }

    /// Groups of tokens in a block.
    pub fn groups(self) -> usize {
        BLOCK / self.tokens
    }
}

/// Byte offsets of one page of one layer; equal for all heads of the layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageLayout {
    pub head_dim: usize,
    pub page_bytes: usize,
    pub unit: UnitShape,
    /// Sum of the widths of all units of K and V of a head.
    pub code_bits: usize,
    pub codes_offset: usize,
    pub code_bytes: usize,
    pub side_offset: usize,
    pub side_bytes: usize,
    pub slots_offset: usize,
    pub slot_bytes: usize,
    pub num_slots: usize,
}

impl PageLayout {
    /// Splits `page_bytes` between codes and at least `slots` exact slots: codes first, then as many slots as the rest
    /// holds (at most 8).
    pub fn new(recipe: &Recipe, head_dim: usize, page_bytes: usize, slots: usize) -> Result<PageLayout> {
        let unit = UnitShape::of(head_dim);
        let units = head_dim / unit.channels;
        let side_bytes = if recipe.calibrated { head_dim * 5 / 2 } else { head_dim * 6 };
        let slot_bytes = 4 + 2 * head_dim;
        // One bit of width of one unit, over all token groups.
        let bit_bytes = 64 * unit.groups();
        let fixed = HEADER + side_bytes + slots * slot_bytes;
        let code_bits = page_bytes.saturating_sub(fixed) / bit_bytes;
        if code_bits < 2 * units {
            return Err(Error::BadRecipe(format!(
                "ratio {} leaves {code_bits} bits for the {} units of head_dim {head_dim}; at least one a unit is needed",
                recipe.ratio,
                2 * units
            )));
        }
        let code_bits = code_bits.min(2 * units * crate::grid::MAX_WIDTH);
        let code_bytes = code_bits * bit_bytes;
        let side_offset = HEADER + code_bytes;
        let slots_offset = side_offset + side_bytes;
        let num_slots = ((page_bytes - slots_offset) / slot_bytes).min(MAX_SLOTS);
        Ok(PageLayout {
            head_dim,
            page_bytes,
            unit,
            code_bits,
            codes_offset: HEADER,
            code_bytes,
            side_offset,
            side_bytes,
            slots_offset,
            slot_bytes,
            num_slots,
        })
    }

    /// Units of one stream.
    pub fn units(&self) -> usize {
        self.head_dim / self.unit.channels
    }
}
