//! The codec handle: a recipe made ready for one model.

use std::ffi::c_char;

use ::kakeya_codec::{Codec, ModelShape};

use crate::checks::{Region, below, pointer};
use crate::error::{Outcome, refuse};
use crate::panic::{boundary, release};
use crate::recipe::parse;
use crate::status::kakeya_status::{self, *};
use crate::text::{text_in, text_out};

/// A recipe made ready for one model: static tables, widths and layouts of all layers.
///
/// Threads: immutable once made; any number of threads may use one codec at once, without locks, and
/// a thread may release what another made. The one rule: kakeya_codec_free comes after every call
/// that uses the codec has returned (as seen by the thread that frees: join it, or hand the codec over).
pub struct kakeya_codec {
    pub(crate) inner: Codec,
}

/// Makes a codec.
///
///   recipe       name of a preset, or a recipe as a JSON object
///   model_json   attention shape of the model:
///                {"num_layers":30,"num_kv_heads":3,"num_q_heads":9,"head_dim":64,"max_position":8192,
///                 "rope":{"rotary_dim":64,"interleaved":false,"inv_freq":[rotary_dim/2 numbers]}}
///                num_*_heads count the whole model, not one rank. "rope":null: no rotary embedding.
///                "interleaved":false pairs channels (i, i + rotary_dim/2), true pairs (2i, 2i + 1).
///   calibration  bytes of a calibration artefact, or NULL with calibration_len 0. What is needed of it
///                is copied. A recipe with "needs_calibration" true must have one, any other none.
///   out          takes the new codec; give it to kakeya_codec_free when no call uses it any more.
///
/// Errors: BAD_RECIPE, BAD_MODEL, BAD_CALIBRATION, CALIBRATION_REQUIRED, CALIBRATION_MISMATCH,
/// WRONG_VERSION (of the artefact), UNSUPPORTED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_codec_new(
    recipe: *const c_char,
    recipe_len: usize,
    model_json: *const c_char,
    model_len: usize,
    calibration: *const u8,
    calibration_len: usize,
    out: *mut *mut kakeya_codec,
) -> kakeya_status {
    boundary(|| {
        pointer("out", out)?;
        // SAFETY: the header asks for a text of this length that stays unchanged during the call.
        let recipe = unsafe { parse(recipe, recipe_len) }?;
        // SAFETY: as above.
        let model = unsafe { text_in("model_json", model_json, model_len) }?;
        if calibration_len == 0 && !calibration.is_null() {
            return refuse!(
                KAKEYA_ERR_BAD_CALIBRATION,
                "calibration has 0 bytes; valid: an artefact, or NULL for none"
            );
        }
        let artefact = Region::new("calibration", calibration, calibration_len)?;
        // SAFETY: the header asks for an array of this length that stays unchanged during the call.
        let artefact = (calibration_len > 0).then(|| unsafe { artefact.shared() });
        let inner = Codec::new(&recipe, &ModelShape::from_json(model)?, artefact)?;
        // SAFETY: not NULL, aligned, and the caller's to write.
        unsafe { out.write(Box::into_raw(Box::new(kakeya_codec { inner }))) };
        Ok(())
    })
}

/// Releases a codec, on any thread. NULL is fine. No other call may use the codec during this one or
/// after it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_codec_free(codec: *mut kakeya_codec) {
    release(|| {
        if !codec.is_null() && codec.is_aligned() {
            // SAFETY: the header asks for a codec of kakeya_codec_new that has not been released; it came
            // out of Box::into_raw there.
            drop(unsafe { Box::from_raw(codec) });
        }
        Ok(())
    })
}

/// The codec as JSON: "name", "page_bytes", "ratio", "quantizer", "fingerprint" (hex digest of the
/// static tables: two codecs with the same fingerprint read each other's pages; keep it with pages
/// that you store, and ask kakeya_codec_require_fingerprint before you read them) and per layer its
/// slots, code bits and widths.
///
/// Errors: BUFFER_TOO_SMALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_codec_describe(
    codec: *const kakeya_codec,
    buf: *mut c_char,
    cap: usize,
    needed: *mut usize,
) -> kakeya_status {
    boundary(|| {
        // SAFETY: the header asks for a codec that is not released during the call.
        let codec = unsafe { borrow(codec) }?;
        // SAFETY: the header asks for a buffer of cap bytes and a size that are the caller's to write.
        unsafe { text_out(&codec.describe().to_string(), buf, cap, needed) }
    })
}

/// OK if pages that were written by a codec with this fingerprint mean the same to this one. A page
/// does not carry the fingerprint itself: whoever keeps pages beyond the life of a codec, or takes
/// them from another process, carries it with them.
///
/// Errors: WRONG_RECIPE (another recipe, model or artefact).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_codec_require_fingerprint(
    codec: *const kakeya_codec,
    fingerprint: *const c_char,
    fingerprint_len: usize,
) -> kakeya_status {
    boundary(|| {
        // SAFETY: the header asks for a codec that is not released during the call.
        let codec = unsafe { borrow(codec) }?;
        // SAFETY: the header asks for a text of this length that stays unchanged during the call.
        let found = unsafe { text_in("fingerprint", fingerprint, fingerprint_len) }?;
        if found == codec.fingerprint() {
            return Ok(());
        }
        refuse!(
            KAKEYA_ERR_WRONG_RECIPE,
            "the pages' fingerprint is '{found}', this codec's is '{}': another recipe, model or artefact wrote them",
            codec.fingerprint()
        )
    })
}

/// Bytes of a page of a layer. The same number for every layer of this version.
///
/// Errors: OUT_OF_RANGE (layer).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_codec_page_bytes(
    codec: *const kakeya_codec,
    layer: u32,
    out: *mut usize,
) -> kakeya_status {
    boundary(|| {
        // SAFETY: the header asks for a codec that is not released during the call.
        let codec = unsafe { borrow(codec) }?;
        pointer("out", out)?;
        check_layer(codec.shape(), layer)?;
        // SAFETY: not NULL, aligned, and the caller's to write.
        unsafe { out.write(codec.page_bytes()) };
        Ok(())
    })
}

/// Borrows the codec of a call.
///
/// # Safety
/// `codec` is NULL or came from kakeya_codec_new and is not released during the call.
pub(crate) unsafe fn borrow<'a>(codec: *const kakeya_codec) -> Outcome<&'a Codec> {
    pointer("codec", codec)?;
    // SAFETY: not NULL, aligned; alive by the promise above, and no call ever writes a codec.
    Ok(unsafe { &(*codec).inner })
}

/// Refuses a layer that the model does not have.
pub(crate) fn check_layer(shape: &ModelShape, layer: u32) -> Outcome {
    below("layer", layer.into(), shape.num_layers as u64)
}

/// Refuses KV heads that the model does not have.
pub(crate) fn check_heads(shape: &ModelShape, first_head: u32, count_name: &str, count: u32) -> Outcome {
    let heads = shape.num_kv_heads as u64;
    below("first_head", first_head.into(), heads)?;
    crate::checks::within(count_name, count.into(), 1, heads - u64::from(first_head))
}
