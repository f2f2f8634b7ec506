//! The exported functions called from Rust, without a loader between: what Miri and the sanitizers see of the way from raw
//! pointers to slices. Every buffer is exactly as long as the header asks. What the calls compute is tested elsewhere.

use std::ptr::{null, null_mut};

use kakeya::kakeya_status::*;
use kakeya::*;

const D: usize = 64;
const BLOCK: usize = KAKEYA_BLOCK_TOKENS as usize;
const RECIPE: &str = "kakeya-free-4.6x";
const MODEL: &str = r#"{"num_layers":1,"num_kv_heads":1,"num_q_heads":2,"head_dim":64,"max_position":256,
    "rope":{"rotary_dim":8,"interleaved":true,"inv_freq":[1.0,0.1,0.01,0.001]}}"#;

fn codec() -> *mut kakeya_codec {
    let mut codec = null_mut();
    // SAFETY: all texts live and are as long as said.
    let status = unsafe {
        kakeya_codec_new(
            RECIPE.as_ptr().cast(),
            RECIPE.len(),
            MODEL.as_ptr().cast(),
            MODEL.len(),
            null(),
            0,
            &mut codec,
        )
    };
    assert_eq!(status, KAKEYA_OK);
    codec
}

/// Values in -2..2.
fn noise(mut state: u64, n: usize) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as f32 / (1_u64 << 30) as f32 - 2.0
    };
    (0..n).map(|_| next()).collect()
}

#[test]
fn texts_fit_exactly() {
    let mut needed = 0;
    // SAFETY: no buffer, a live size.
    assert_eq!(unsafe { kakeya_recipe_list(null_mut(), 0, &mut needed) }, KAKEYA_OK);
    let mut text = vec![0_u8; needed];
    // SAFETY: both live and as long as said.
    let status = unsafe { kakeya_recipe_list(text.as_mut_ptr().cast(), text.len(), &mut needed) };
    assert_eq!((status, text.last()), (KAKEYA_OK, Some(&0)));
    // SAFETY: as above, one byte shorter.
    let status = unsafe { kakeya_recipe_list(text.as_mut_ptr().cast(), text.len() - 1, &mut needed) };
    assert_eq!(status, KAKEYA_ERR_BUFFER_TOO_SMALL);
}

#[test]
fn a_step_through_raw_pointers() {
    let codec = codec();
    let mut bytes = 0;
    // SAFETY: codec and size live.
    assert_eq!(unsafe { kakeya_codec_page_bytes(codec, 0, &mut bytes) }, KAKEYA_OK);
    let tokens = BLOCK + 1;
    let (k, v) = (noise(1, tokens * D), noise(2, tokens * D));
    let (mut pages, mut open_blocks) = (vec![0_u8; 2 * bytes], vec![0.0_f32; 2 * BLOCK * D]);
    let (open_slot, table) = ([0_i32, -1], [1_i32, 0]);
    let slots: Vec<i64> =
        (0..tokens).map(|p| i64::from(table[p / BLOCK]) * BLOCK as i64 + (p % BLOCK) as i64).collect();
    let positions: Vec<i32> = (0..tokens as i32).collect();
    let written = kakeya_write_args {
        struct_size: size_of::<kakeya_write_args>() as u32,
        layer: 0,
        first_head: 0,
        num_heads: 1,
        dtype: 2,
        num_tokens: tokens as u32,
        num_blocks: 2,
        num_open: 1,
        k: k.as_ptr().cast(),
        v: v.as_ptr().cast(),
        k_token_stride: D as i64,
        k_head_stride: D as i64,
        v_token_stride: D as i64,
        v_head_stride: D as i64,
        slot_mapping: slots.as_ptr(),
        positions: positions.as_ptr(),
        pages: pages.as_mut_ptr(),
        page_block_stride: bytes as i64,
        page_head_stride: bytes as i64,
        open_blocks: open_blocks.as_mut_ptr().cast(),
        open_slot: open_slot.as_ptr(),
    };
    // SAFETY: everything lives and is as long as said.
    assert_eq!(unsafe { kakeya_write(codec, &written) }, KAKEYA_OK);
    // SAFETY: as above; refused, because the pages are where k is read.
    let aliased = unsafe { kakeya_write(codec, &kakeya_write_args { k: pages.as_ptr().cast(), ..written }) };
    assert_eq!(aliased, KAKEYA_ERR_ALIASED);

    let q = vec![0.5_f32; 2 * D];
    let (mut out, mut lse) = (vec![f32::NAN; 2 * D], vec![f32::NAN; 2]);
    let (query_start, seq_lens) = ([0_i32, 1], [tokens as i32]);
    let attended = kakeya_attend_args {
        struct_size: size_of::<kakeya_attend_args>() as u32,
        layer: 0,
        first_head: 0,
        num_kv_heads: 1,
        num_q_heads: 2,
        dtype: 2,
        num_seqs: 1,
        num_tokens: 1,
        num_blocks: 2,
        num_open: 1,
        max_blocks_per_seq: 2,
        flags: 0,
        scale: 0.125,
        q: q.as_ptr().cast(),
        k: k[BLOCK * D..].as_ptr().cast(),
        v: v[BLOCK * D..].as_ptr().cast(),
        q_token_stride: 2 * D as i64,
        q_head_stride: D as i64,
        k_token_stride: D as i64,
        k_head_stride: D as i64,
        v_token_stride: D as i64,
        v_head_stride: D as i64,
        out: out.as_mut_ptr().cast(),
        out_token_stride: 2 * D as i64,
        out_head_stride: D as i64,
        query_start: query_start.as_ptr(),
        seq_lens: seq_lens.as_ptr(),
        block_table: table.as_ptr(),
        block_table_stride: 2,
        pages: pages.as_ptr(),
        page_block_stride: bytes as i64,
        page_head_stride: bytes as i64,
        open_blocks: open_blocks.as_ptr().cast(),
        open_slot: open_slot.as_ptr(),
        lse: lse.as_mut_ptr(),
    };
    // SAFETY: everything lives and is as long as said.
    assert_eq!(unsafe { kakeya_attend(codec, &attended) }, KAKEYA_OK);
    assert!(out.iter().chain(&lse).all(|x| x.is_finite()));

    let (mut ko, mut vo) = (vec![0.0_f32; BLOCK * D], vec![0.0_f32; BLOCK * D]);
    // SAFETY: as above; the page of block 1.
    let status = unsafe {
        kakeya_open(codec, 0, 0, pages[bytes..].as_ptr(), bytes, ko.as_mut_ptr(), vo.as_mut_ptr(), BLOCK * D)
    };
    assert_eq!(status, KAKEYA_OK);
    // SAFETY: made above, released once.
    unsafe { kakeya_codec_free(codec) };
}
