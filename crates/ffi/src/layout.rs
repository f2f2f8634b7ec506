//! Where things lie in a page, for callers that read pages themselves (kernels, tools).

use std::mem::size_of;

use crate::checks::{Sized32, struct_size};
use crate::codec::{borrow, check_layer, kakeya_codec};
use crate::error::{Outcome, refuse};
use crate::panic::boundary;
use crate::status::kakeya_status::{self, *};

/// Where the parts of a page of one layer lie; offsets and sizes in bytes. What the parts mean is
/// in docs/page-format.md.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kakeya_page_layout {
    /// sizeof(kakeya_page_layout), set by the caller.
    pub struct_size: u32,
    /// Tokens of a block: 128.
    pub block_tokens: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// The layer that was asked for.
    pub layer: u32,
    /// The whole page.
    pub page_bytes: u32,
    /// Where the header begins: 0.
    pub header_offset: u32,
    /// Bytes of the header.
    pub header_bytes: u32,
    /// Where the codes begin: K's, then V's. Where V's begin depends on the head: after the sum of its
    /// "k_widths" in kakeya_codec_describe.
    pub k_codes_offset: u32,
    /// Bytes of the codes of K and V together.
    pub k_codes_and_v_codes_bytes: u32,
    /// Where the side data begin: block statistics of K's channels, then of V's.
    pub side_offset: u32,
    /// Bytes of the side data.
    pub side_bytes: u32,
    /// Where the exact slots begin: num_slots times slot_bytes.
    pub slots_offset: u32,
    /// Bytes of one exact slot.
    pub slot_bytes: u32,
    /// Exact slots of a page.
    pub num_slots: u32,
}

// SAFETY: repr(C), struct_size first, integers only.
unsafe impl Sized32 for kakeya_page_layout {
    const NAME: &'static str = "kakeya_page_layout";
}

/// Fills in the layout of a page of a layer. The caller sets out->struct_size first.
///
/// Errors: BAD_STRUCT_SIZE, OUT_OF_RANGE (layer).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_codec_page_layout(
    codec: *const kakeya_codec,
    layer: u32,
    out: *mut kakeya_page_layout,
) -> kakeya_status {
    boundary(|| {
        struct_size("out", out)?;
        // SAFETY: the header asks for a codec that is not released during the call.
        let codec = unsafe { borrow(codec) }?;
        check_layer(codec.shape(), layer)?;
        let layout = codec.page_layout(layer as usize)?;
        let filled = kakeya_page_layout {
            struct_size: size_of::<kakeya_page_layout>() as u32,
            block_tokens: super::version::KAKEYA_BLOCK_TOKENS,
            head_dim: narrow("head_dim", layout.head_dim)?,
            layer,
            page_bytes: narrow("page_bytes", layout.page_bytes)?,
            header_offset: 0,
            header_bytes: narrow("header_bytes", layout.codes_offset)?,
            k_codes_offset: narrow("k_codes_offset", layout.codes_offset)?,
            k_codes_and_v_codes_bytes: narrow("k_codes_and_v_codes_bytes", layout.code_bytes)?,
            side_offset: narrow("side_offset", layout.side_offset)?,
            side_bytes: narrow("side_bytes", layout.side_bytes)?,
            slots_offset: narrow("slots_offset", layout.slots_offset)?,
            slot_bytes: narrow("slot_bytes", layout.slot_bytes)?,
            num_slots: narrow("num_slots", layout.num_slots)?,
        };
        // SAFETY: not NULL, aligned, of this size (struct_size), and the caller's to write.
        unsafe { out.write(filled) };
        Ok(())
    })
}

fn narrow(name: &str, value: usize) -> Outcome<u32> {
    match u32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => refuse!(KAKEYA_ERR_OVERFLOW, "{name} is {value}; valid: below 2^32"),
    }
}
