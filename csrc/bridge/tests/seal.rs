//! Sealing by the device functions against the codec: every byte of the page.

#[path = "../../../crates/codec/tests/common/mod.rs"]
mod common;

use kakeya_codec::device::tables;
use kakeya_codec::{BLOCK, Codec, Recipe, Rows};

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(8).map(|c| u64::from_le_bytes(std::array::from_fn(|i| *c.get(i).unwrap_or(&0)))).collect()
}

fn check(
    c: &Codec,
    t: &[u64],
    what: &str,
    (layer, head, block): (usize, usize, usize),
    k: &[f32],
    v: &[f32],
) {
    let d = c.shape().head_dim;
    let (mut ours, mut theirs) = (vec![0x11; c.page_bytes()], vec![0x22; c.page_bytes()]);
    c.seal(layer, head, block, Rows::dense(k, d), Rows::dense(v, d), &mut ours).unwrap();
    assert!(kakeya_bridge::seal(t, layer as u32, head as u32, block as u32, k, v, &mut theirs).unwrap());
    let first = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert!(first.is_none(), "{what} D={d}: byte {} differs", first.unwrap());
    let mut opened = [vec![0.0; BLOCK * d], vec![0.0; BLOCK * d], vec![1.0; BLOCK * d], vec![1.0; BLOCK * d]];
    let [k, v, k_device, v_device] = &mut opened;
    c.open(layer, head, &ours, k, v).unwrap();
    kakeya_bridge::open(t, layer as u32, head as u32, &ours, k_device, v_device).unwrap();
    let equal = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(equal(k, k_device) && equal(v, v_device), "{what} D={d}: opened rows differ");
}

#[test]
fn pages_equal_the_codec_byte_for_byte() {
    for d in [64, 96, 128, 256] {
        for name in Recipe::presets() {
            let c = common::codec(&name, &common::shape(d, d == 96, if d == 256 { 64 } else { d }));
            let t = words(&tables(&c));
            for (layer, head, block) in [(0, 1, 0), (1, 0, 9)] {
                let (k, v) = common::natural_block(&c, layer, head, block, (d + block) as u64);
                check(&c, &t, &name, (layer, head, block), &k, &v);
            }
        }
    }
}

#[test]
fn hostile_input_too() {
    for name in ["kakeya-4.6x-trellis", "kakeya-free-4.6x-trellis", "kakeya-free-4.6x"] {
        let c = common::codec(name, &common::shape(64, false, 64));
        let t = words(&tables(&c));
        let (k, v) = common::natural_block(&c, 0, 0, 2, 3);
        for factor in [0.0f32, -0.0, 1e-42, 1e-30, 1e-6, 1e3, 1e5] {
            let scaled = |x: &[f32]| x.iter().map(|x| x * factor).collect::<Vec<_>>();
            check(&c, &t, name, (0, 0, 2), &scaled(&k), &scaled(&v));
        }
        check(&c, &t, name, (0, 0, 2), &[358.0; BLOCK * 64], &[-3.0; BLOCK * 64]);
        let mut page = vec![0x33; c.page_bytes()];
        for bad in [f32::NAN, f32::INFINITY, -1e9] {
            for in_k in [true, false] {
                let (mut k, mut v) = (k.clone(), v.clone());
                (if in_k { &mut k } else { &mut v })[4321] = bad;
                assert!(!kakeya_bridge::seal(&t, 0, 0, 2, &k, &v, &mut page).unwrap());
                assert!(page.iter().all(|b| *b == 0x33));
            }
        }
    }
}

#[test]
fn what_is_no_page_opens_as_nan() {
    let c = common::codec("kakeya-4.6x-trellis", &common::shape(64, false, 64));
    let t = words(&tables(&c));
    let (k, v) = common::natural_block(&c, 0, 0, 2, 3);
    let mut page = vec![0; c.page_bytes()];
    c.seal(0, 0, 2, Rows::dense(&k, 64), Rows::dense(&v, 64), &mut page).unwrap();
    for (at, byte) in [(0, 0), (1, 1), (2, 1), (3, 9), (7, 1), (8, 128)] {
        let mut bad = page.clone();
        bad[at] = byte;
        let (mut k, mut v) = (vec![0.0; BLOCK * 64], vec![0.0; BLOCK * 64]);
        assert!(c.open(0, 0, &bad, &mut k, &mut v).is_err());
        kakeya_bridge::open(&t, 0, 0, &bad, &mut k, &mut v).unwrap();
        assert!(k.iter().chain(&v).all(|x| x.is_nan()), "byte {at}");
    }
}
