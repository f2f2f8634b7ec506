//! Every kind of call once, as small as a page allows: what Miri and the sanitizers have time for (`scripts/sanitize.sh`). What
//! the calls compute is the other tests' concern.

mod common;

use kakeya_codec::step::{AttendArgs, AttendOptions, Pages, WriteArgs, attend, write};
use kakeya_codec::{BLOCK, Codec, Elements, ElementsMut, Rows, Tensor};

const D: usize = 64;

/// One layer and one head, so that interpreted code comes to an end.
fn codec(recipe: &str) -> Codec {
    let mut shape = common::shape(D, true, 16);
    (shape.num_layers, shape.num_kv_heads, shape.num_q_heads) = (1, 1, 2);
    common::codec(recipe, &shape)
}

fn block(seed: u64) -> Vec<f32> {
    let mut noise = common::Noise(seed);
    (0..BLOCK * D).map(|_| (noise.uniform() * 4.0 - 2.0) as f32).collect()
}

#[test]
fn a_block_becomes_a_page_and_rows_again() {
    // One of each quantiser, calibrated and not; interpreted code has time for one.
    let recipes = ["kakeya-free-4.6x", "kakeya-4.6x", "kakeya-free-4.6x-lloyd-max", "kakeya-4.6x-trellis"];
    for recipe in &recipes[..if cfg!(miri) { 1 } else { recipes.len() }] {
        let c = codec(recipe);
        let (k, v) = (block(1), block(2));
        // Every buffer is as long as it must be and not longer.
        let mut page = vec![0xa5; c.page_bytes()];
        c.seal(0, 0, 3, Rows::dense(&k, D), Rows::dense(&v, D), &mut page).unwrap();
        let (mut ko, mut vo) = (vec![0.0; BLOCK * D], vec![0.0; BLOCK * D]);
        c.open(0, 0, &page, &mut ko, &mut vo).unwrap();
        assert!(common::relative(&k, &ko) < 1.0 && common::relative(&v, &vo) < 1.0);
        // What a page can be refused for: its version, a flag, its slots, its place.
        for (at, byte) in [(0, 0), (1, 2), (2, 1), (3, 9), (7, 0xff), (8, 200)] {
            let mut other = page.clone();
            other[at] = byte;
            let _ = c.open(0, 0, &other, &mut ko, &mut vo);
        }
    }
}

#[test]
fn a_step_is_written_and_attended() {
    let c = codec("kakeya-free-4.6x");
    // A full block, sealed straight from the step, and one token more in an open block.
    let tokens = BLOCK + 1;
    let k = [block(1), vec![0.5; D]].concat();
    let v = [block(2), vec![0.25; D]].concat();
    let tensor = |data| Tensor { data: Elements::F32(data), token_stride: D, head_stride: D };
    let bytes = c.page_bytes();
    let mut pages = vec![0; 2 * bytes];
    let mut open_blocks = vec![0.0; 2 * BLOCK * D];
    let (open_slot, table) = ([0, -1], [1, 0]);
    let slots: Vec<i64> =
        (0..tokens).map(|p| i64::from(table[p / BLOCK]) * BLOCK as i64 + (p % BLOCK) as i64).collect();
    let positions: Vec<i32> = (0..tokens as i32).collect();
    let mut written = WriteArgs {
        layer: 0,
        first_head: 0,
        num_heads: 1,
        num_tokens: tokens,
        k: tensor(&k),
        v: tensor(&v),
        slot_mapping: &slots,
        positions: &positions,
        pages: &mut pages,
        num_blocks: 2,
        page_block_stride: bytes,
        page_head_stride: bytes,
        open_blocks: ElementsMut::F32(&mut open_blocks),
        num_open: 1,
        open_slot: &open_slot,
    };
    write(&c, &mut written).unwrap();
    // Decoding: the last token sees the page, the open block and itself.
    let q = vec![0.5; 2 * D];
    let (mut out, mut lse) = (vec![f32::NAN; 2 * D], vec![f32::NAN; 2]);
    let mut attended = AttendArgs {
        layer: 0,
        first_head: 0,
        num_kv_heads: 1,
        num_q_heads: 2,
        num_tokens: 1,
        scale: 0.125,
        sealed_prefill: false,
        q: Tensor { data: Elements::F32(&q), token_stride: 2 * D, head_stride: D },
        k: tensor(&k[BLOCK * D..]),
        v: tensor(&v[BLOCK * D..]),
        out: ElementsMut::F32(&mut out),
        out_token_stride: 2 * D,
        out_head_stride: D,
        query_start: &[0, 1],
        seq_lens: &[tokens as i32],
        block_table: &table,
        block_table_stride: 2,
        max_blocks_per_seq: 2,
        pages: Pages { bytes: &pages, num_blocks: 2, block_stride: bytes, head_stride: bytes },
        open_blocks: Elements::F32(&open_blocks),
        num_open: 1,
        open_slot: &open_slot,
        lse: Some(&mut lse),
        options: AttendOptions::default(),
    };
    attend(&c, &mut attended).unwrap();
    assert!(out.iter().chain(&lse).all(|x| x.is_finite()));
}
