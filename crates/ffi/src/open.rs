//! Opening a page: the way back to numbers, for tests, tools and dequantised workspaces.

use crate::checks::{Region, below, disjoint};
use crate::codec::{borrow, check_layer, kakeya_codec};
use crate::error::refuse;
use crate::panic::boundary;
use crate::status::kakeya_status::{self, *};
use crate::version::KAKEYA_BLOCK_TOKENS;

/// Decodes one page into K (after RoPE, as it was sealed) and V.
///
///   layer, head  of the page; head counts the KV heads of the whole model
///   page         page_len bytes, at least kakeya_codec_page_bytes(codec, layer)
///   k, v         float [128][head_dim] each
///   out_len      floats that each of k and v holds, at least 128 * head_dim
///
/// The position of the block is in the page. Errors: OUT_OF_RANGE (layer, head), BUFFER_TOO_SMALL
/// (page_len, out_len), ALIASED, BAD_PAGE, WRONG_VERSION (of the page).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_open(
    codec: *const kakeya_codec,
    layer: u32,
    head: u32,
    page: *const u8,
    page_len: usize,
    k: *mut f32,
    v: *mut f32,
    out_len: usize,
) -> kakeya_status {
    boundary(|| {
        // SAFETY: the header asks for a codec that is not released during the call.
        let codec = unsafe { borrow(codec) }?;
        check_layer(codec.shape(), layer)?;
        below("head", head.into(), codec.shape().num_kv_heads as u64)?;
        let page_bytes = codec.page_bytes();
        if page_len < page_bytes {
            return refuse!(
                KAKEYA_ERR_BUFFER_TOO_SMALL,
                "page_len is {page_len}; a page of this codec has {page_bytes} bytes"
            );
        }
        let floats = KAKEYA_BLOCK_TOKENS as usize * codec.shape().head_dim;
        if out_len < floats {
            return refuse!(
                KAKEYA_ERR_BUFFER_TOO_SMALL,
                "out_len is {out_len}; k and v take {floats} floats each"
            );
        }
        let page = Region::new("page", page, page_bytes)?;
        let k = Region::new("k", k, floats)?;
        let v = Region::new("v", v, floats)?;
        disjoint(&[k.extent(), v.extent()], &[page.extent()])?;
        // SAFETY: checked above; the header asks for memory that is there and left alone during the call.
        let (page, k, v) = unsafe { (page.shared(), k.exclusive(), v.exclusive()) };
        Ok(codec.open(layer as usize, head as usize, page, k, v)?)
    })
}
